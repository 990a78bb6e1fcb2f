"""Faults that the comparison with other people's code must find.  Rows of `make test-mutants`."""

from tests.plant import Mutant

PARITY, TRL = "tests/parity/test_parity.py", "tests/parity/test_parity_trl.py"
MUTANTS = [
    Mutant("parity: DFT weighs by the square of p", "megatron_plugin/losses/dft.py", "weight_T = stats.logp.detach().exp()", "weight_T = (2 * stats.logp.detach()).exp()", f"{PARITY} -k dft"),
    Mutant("parity: IDFT's ramp starts from SFT, not DFT", "megatron_plugin/losses/idft.py", "gamma_T = 1 + ramp * (gamma_T - 1)", "gamma_T = ramp * gamma_T", f"{PARITY} -k idft"),
    Mutant("parity: lambda is reached one transition late", "megatron_plugin/schedules/ramp.py", "return (progress - warmup_ratio) / transition_ratio", "return (progress - warmup_ratio) / (warmup_ratio + transition_ratio)", f"{PARITY} -k idft_lambda"),
    Mutant("parity: LUFFY multiplies by gamma where it divides", "megatron_plugin/losses/luffy.py", "stats.logp - as_scalar(gamma, stats.logp).log()", "stats.logp + as_scalar(gamma, stats.logp).log()", f"{PARITY} -k luffy"),
    Mutant("parity: LUFFY's advantages are of the union", "megatron_plugin/losses/advantages.py", "return (demo - group.mean()) / (std + eps)", "return (demo - torch.cat((group, demo)).mean()) / (std + eps)", f"{PARITY} -k luffy_advantages"),
    Mutant("parity: SRFT's code preset has the paper's sign", "megatron_plugin/losses/srft.py", 'sign = -1.0 if preset == "paper" else 1.0', "sign = -1.0", f"{PARITY} -k srft_code"),
    Mutant("parity: SRFT's wrong tokens end at e^-6", "megatron_plugin/losses/srft.py", "wrong_floor: float | Tensor = -10.0", "wrong_floor: float | Tensor = -6.0", f"{PARITY} -k srft_paper_rare"),
    Mutant("parity: SRFT's right answers are those of a positive advantage", "megatron_plugin/losses/srft.py", 'right_T = inputs.require("extra.reward", "srft") > 0', 'right_T = inputs.require("advantage", "srft") > 0', f"{PARITY} -k srft_paper_rare"),
    Mutant("parity: SRFT's floor cannot be switched off", "megatron_plugin/losses/srft.py", "stats.logp.clamp(min=wrong_floor)", "stats.logp.clamp(min=-10.0)", f"{PARITY} -k srft_paper_floor"),
    Mutant("parity: IDFT's gamma may fall to 0.01", "megatron_plugin/losses/idft.py", "gamma_min: float | Tensor = 0.1", "gamma_min: float | Tensor = 0.01", f"{PARITY} -k idft_beta_0.3"),
    Mutant("parity: cll_sigmoid rises with cll", "megatron_plugin/losses/cll.py", "torch.sigmoid(-(cll_T - tau)", "torch.sigmoid((cll_T - tau)", f"{PARITY} -k indomain"),
    Mutant("parity: EAFT's log is to base 2", "megatron_plugin/losses/eaft.py", "as_scalar(vocab_size, entropy_T).log())", "as_scalar(vocab_size, entropy_T).log2())", f"{PARITY} -k eaft"),
    Mutant("parity: a source's share is dropped", "megatron_plugin/parallel/normaliser.py", "out = torch.where(tokens, source.share * total * per_token, out)", "out = torch.where(tokens, total * per_token, out)", f"{PARITY} -k chord"),
    Mutant("parity: the upper clip is the lower one's width", "megatron_plugin/losses/grpo.py", "ratio_T.clamp(max=1 + clip_high))", "ratio_T.clamp(max=1 + clip_low))", f"{TRL} -k dapo"),
    Mutant("parity: GSPO's ratio is the product, not the geometric mean", "megatron_plugin/losses/gspo.py", "(total_T / count_T.clamp(min=1))", "total_T", f"{TRL} -k sequence"),
    Mutant("parity: eps is verl's whatever is asked for", "megatron_plugin/losses/advantages.py", "return centred / (std + eps)", "return centred / (std + 1e-6)", f"{TRL} -k scale_rewards"),
    Mutant("parity: population deviation", "megatron_plugin/losses/advantages.py", "1.0 if alone else group.std()", "1.0 if alone else group.std(correction=0)", f"{TRL} -k scale_rewards"),
    Mutant("parity: k3 of the other direction", "megatron_plugin/losses/kl.py", "torch.expm1(log_ratio_T) - log_ratio_T", "torch.expm1(-log_ratio_T) + log_ratio_T", f"{TRL} -k beta"),
    Mutant("parity: IcePop keeps what is above its band", "megatron_plugin/losses/mismatch.py", "(ratio_T < icepop_low) | (ratio_T > icepop_high)", "(ratio_T < icepop_low)", f"{TRL} -k token_mask"),
    Mutant("parity: an answer's weight is of its mean log-ratio", "megatron_plugin/losses/advantages.py", "float(log_ratio_T.sum().clamp(", "float(log_ratio_T.mean().clamp(", f"{TRL} -k sequence_"),
    Mutant("parity: CISPO's bound is clip_high itself", "megatron_plugin/losses/cispo.py", "clamp(min=1 - clip_low).clamp(max=1 + clip_high)", "clamp(min=1 - clip_low).clamp(max=clip_high)", f"{TRL} -k cispo"),
    Mutant("parity: Dr. GRPO divides by tokens, not sequences", "megatron_plugin/parallel/normaliser.py", "/ (source.constant * sequences)", "/ (source.constant * sequence_tokens)", f"{TRL} -k dr_grpo"),
    Mutant("parity: the judge loses a NaN", "tests/parity/cell.py", "return math.inf if math.isnan(found) else found", "return found", f"{PARITY} -k difference"),
    Mutant("parity: a stale explanation passes", "tests/parity/cell.py", "elif cell.why and not apart > bounds[SHORT[cell.dtypes[0]]]:", "elif False:", f"{PARITY} -k explanation"),
]
