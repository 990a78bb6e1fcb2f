"""Faults of what arXiv 2602.12222 brought: cll and IDFT, `score`, hinted decoding, `realign`.  Rows of `make test-mutants`."""

from tests.plant import Mutant

R, T, TWINS = "megatron_plugin/rollout/", "megatron_plugin/trainer/", "tests/kernels/test_weighting.py"
HINTED, ALIGN = R + "hinted/", T + "realigning.py"
MIX, PAIRS = "tests/rollout/test_hinted_mixing.py", "tests/rollout/test_hinted_pairs.py"
DECODE, REALIGN, REALIGNING = "tests/rollout/test_hinted_decode.py", "tests/rollout/test_realign.py", "tests/trainer/test_realigning.py"
SCORING, SCORES, CLAIM = "tests/trainer/test_scoring.py", "tests/data/test_scores.py", "tests/data/test_claim.py"
CLL = "megatron_plugin/losses/cll.py"

MUTANTS = [
    Mutant("IDFT's ramp begins in the middle", "megatron_plugin/schedules/ramp.py", "return (progress - warmup_ratio) / transition_ratio", "return progress / transition_ratio", "tests/schedules/test_ramp.py"),
    Mutant("the step's ramp does not reach the loss", T + "update.py", "    run.ramp.fill_(ramp)\n", "", "tests/trainer/test_ramp.py -k warm_up"),
    Mutant("IDFT ignores its ramp", "megatron_plugin/losses/idft.py", "    gamma_T = 1 + ramp * (gamma_T - 1)\n", "", "tests/losses/test_values.py -k idft"),
    Mutant("a token on the threshold is masked", CLL, "cll_T >= threshold", "cll_T > threshold", "tests/losses/test_values.py -k cll"),
    Mutant("a token on the threshold is masked in the kernel", "kernels/weighting.py", "logp + H >= threshold", "logp + H > threshold", f"{TWINS} -k cll_mask"),
    Mutant("the sigmoid of cll has the sign of its name", CLL, "torch.sigmoid(-(cll_T - tau)", "torch.sigmoid((cll_T - tau)", "tests/losses/test_values.py -k cll"),
    Mutant("a token that is exactly 1 nat below counts as surprising", CLL, "*(cll < -nats for", "*(cll <= -nats for", "tests/losses/test_cll.py"),
    Mutant("a score that a kill cut off stays in the file", "megatron_plugin/data/scores.py", "        self._file.truncate(end)\n", "", f"{SCORES} -k cut_anywhere"),
    Mutant("a sample's first token is scored", "megatron_plugin/data/scores.py", "    live[0] = False\n", "", f"{SCORES} -k 'means or without_a_predicted'"),
    Mutant("short samples weigh as much as long ones", "megatron_plugin/data/scores.py", 'sums[name] += score[name] * score["tokens"]', "sums[name] += score[name]", f"{SCORES} -k sum_weighs"),
    Mutant("a recipe goes over the file that names it", "megatron_plugin/config/load.py", "(*_recipe(layer), layer)", "(layer, *_recipe(layer))", "tests/test_config_recipes.py -k go_over"),
    Mutant("every replica scores every sample", T + "scoring.py", "window[self.ranks.index :: self.ranks.count]", "window", f"{SCORING} -k 'matter and DP2'"),
    Mutant("the gathered scores of replicas are not put in order", T + "scoring.py", "scores = sorted((one for part in self.ranks.gather(mine) for one in part), key=lambda one: one[\"line\"])",
           "scores = [one for part in self.ranks.gather(mine) for one in part]", f"{SCORING} -k 'matter and DP2'"),
    Mutant("results of something else are continued", "megatron_plugin/data/claim.py", "if there != wanted:", "if False:", CLAIM),
    Mutant("a key that is new to the note goes unnoticed", "megatron_plugin/data/claim.py", "if there != wanted:", "if there.items() - wanted.items():", CLAIM),
    # hinted decoding
    Mutant("the hinted stream keeps its full weight in the mix", HINTED + "mixing.py", "(1 - share_N1) * logp_NV + share_N1", "logp_NV + share_N1", MIX),
    Mutant("lambda is that of the plain stream's entropy", HINTED + "mixing.py", "share_of_plain(logp_NV, options)\n    for", "share_of_plain(logq_NV, options)\n    for", MIX),
    Mutant("lambda's entropy is in nats", HINTED + "mixing.py", "relative_N1 = entropy_N1 / math.log(options.vocab_size)", "relative_N1 = entropy_N1", MIX),
    Mutant("the sigmoid schedule falls with the entropy", HINTED + "mixing.py", "torch.sigmoid(options.beta * (relative_N1 - options.center))", "torch.sigmoid(options.beta * (options.center - relative_N1))", MIX),
    Mutant("the piecewise schedule reaches 1 too late", HINTED + "mixing.py", "(relative_N1 - low) / (high - low)", "(relative_N1 - low) / high", MIX),
    Mutant("lambda may be above 1", HINTED + "mixing.py", "    return share_N1.clamp(0.0, 1.0)", "    return share_N1", MIX),
    Mutant("the nucleus is cut from a mix that is not normalised", HINTED + "mixing.py", "keep_nucleus(logm_NV.log_softmax(-1), options.top_p)", "keep_nucleus(logm_NV, options.top_p)", MIX),
    Mutant("the token that reaches top_p is left out", HINTED + "mixing.py", "logm_NV < last_N1", "logm_NV <= last_N1", MIX),
    Mutant("a nucleus wider than its head is cut to nothing", HINTED + "mixing.py", "    if len(wide):", "    if False:", f"{MIX} -k wide"),
    Mutant("the first token is mixed", HINTED + "mixing.py", "elif phase is Phase.FIRST and options.first_from_hint:", "elif False:", MIX),
    Mutant("a stream without a say vetoes", HINTED + "mixing.py", "in ((0.0, logp_NV), (1.0, logq_NV)):", "in ():", f"{MIX} -k impossible"),
    Mutant("impossible tokens make the entropy NaN", HINTED + "mixing.py", "logp_NV.clamp(min=LEAST)", "logp_NV", f"{MIX} -k impossible"),
    Mutant("the best tokens come worst first", HINTED + "mixing.py", "np.sort(best_NK, axis=-1)[:, ::-1]", "np.sort(best_NK, axis=-1)", f"{MIX} -k nucleus"),
    Mutant("the hint is heard after the splitter", HINTED + "pairs.py", "        if self.split_at is not None:\n            return Phase.PLAIN\n", "", f"{PAIRS} -k splitter"),
    Mutant("rows that drew different tokens stay a pair", HINTED + "pairs.py", "(hinted[-1] != plain[-1] or hinted[-1] < 0)", "hinted[-1] < 0", f"{PAIRS} -k part"),
    Mutant("steps of one stream alone are not counted", HINTED + "pairs.py", "            pair.unpaired += 1\n", "", f"{PAIRS} -k alone_breaks"),
    Mutant("of two rows that change places one is lost", HINTED + "pairs.py", "if swap and back is not None:", "if False:", f"{PAIRS} -k followed"),
    Mutant("a splitter within two tokens is not seen", HINTED + "stops.py", 'self.tail = self.tail[-(len(self.splitter) - 1) :] if len(self.splitter) > 1 else ""', 'self.tail = ""', MIX),
    Mutant("half a character is text", HINTED + "stops.py", "if cut and len(self.pending) < MAX_PENDING:", "if False:", MIX),
    Mutant("the last run of tokens repeats nothing", HINTED + "stops.py", "range(len(tokens) - ngram + 1)", "range(len(tokens) - ngram)", f"{MIX} -k repeats"),
    Mutant("the budget of a step forgets those that run", HINTED + "decode.py", " - 2 * len(running)\n", "\n", f"{DECODE} -k share_of"),
    Mutant("pairs that one step has no room for wait for an answer", HINTED + "decode.py", "        return True\n", "        return False\n", f"{DECODE} -k share_of"),
    Mutant("answers of pairs that fell out of step are kept", HINTED + "decode.py", "            if cause is not None:\n", "            if False:\n", f"{DECODE} -k 'change_no_answer or believed'"),
    Mutant("pairs that fell out of step are not counted", HINTED + "decode.py", '                result.counts["desynchronised"] += 1\n', "", f"{DECODE} -k change_no_answer"),
    Mutant("the last attempt has company", HINTED + "decode.py", "alone = attempt > 1 and attempt == self.attempts", "alone = False", f"{DECODE} -k last_attempt"),
    Mutant("pairs are handed in while the engine steps", HINTED + "decode.py", "        self.engine.pause()\n", "        self.engine.pause(), self.engine.resume()\n", f"{DECODE} -k until_both"),
    Mutant("pairs are handed in before the others have begun", HINTED + "decode.py", "        self._until_begun()\n", "", f"{DECODE} -k 'one_step or share_of'"),
    Mutant("each stream has the room of its own prompt", HINTED + "decode.py", "self.engine.max_model_len - longest),\n        )  # fmt: skip", "self.engine.max_model_len - len(prompt.plain_ids)),\n        )  # fmt: skip", f"{DECODE} -k longer_stream"),
    Mutant("all pairs are drawn with one seed", HINTED + "decode.py", 'f"{seed}:{key}"', 'f"{seed}"', f"{DECODE} -k seeds"),
    Mutant("streams of different weights are one pair", HINTED + "samples.py", "if hinted.weight_version != plain.weight_version:", "if False:", f"{DECODE} -k out_of_step"),
    Mutant("equal tokens of different distributions are one pair's", HINTED + "samples.py", "if report.ended is None and hinted.logprobs != plain.logprobs:", "if False:", f"{DECODE} -k out_of_step"),
    Mutant("the last verified answer is kept, not the first", HINTED + "realign.py", "if fine is None and item.result is None:", "if fine is None:", f"{REALIGN} -k several_unaided"),
    Mutant("an unaided answer without an end is verified", HINTED + "realign.py", ' if c.finish_reason == "stop"]', "]", f"{REALIGN} -k own_hinted"),
    Mutant("an analysis is cut at its first marker", HINTED + "realign.py", "analysis.rfind(", "analysis.find(", f"{REALIGN} -k hinted_prompt"),
    Mutant("hinted answers without an end are kept", HINTED + "realign.py", "if end is not EndReason.EOS:", "if False:", f"{REALIGN} -k bad_has"),
    Mutant("experts without an answer are asked about", HINTED + "realign.py", "if cause == UNANSWERED:", "if False:", f"{REALIGN} -k expert_without"),
    Mutant("samples that are done are realigned again", HINTED + "realign.py", "if item.source not in done)", ")", f"{REALIGN} -k goes_on"),
    # the command realign
    Mutant("realign goes on from the first line", ALIGN, "islice(enumerate(iter_lines(task.data), 1), self.file.lines, ", "islice(enumerate(iter_lines(task.data), 1), 0, ", f"{REALIGNING} -k cut_off"),
    Mutant("an engine's death leaves no results", ALIGN, "        try:\n            yield\n        finally:\n            write_results(self.file.path)", "        yield\n        write_results(self.file.path)", f"{REALIGNING} -k dies"),
    Mutant("the ends of config.json are forgotten", T + "hf_engine.py", "            found |= set(ends) if isinstance(ends, list) else {ends}\n", "", f"{REALIGNING} -k without_an_end"),
    Mutant("a tokenizer without an end is let through", ALIGN, "        if not ends:\n", "        if False:\n", f"{REALIGNING} -k without_an_end"),
    Mutant("answers of another beta are continued", ALIGN, '("reward", "unaided", "analysis_prompt", *OF_DECODING)', '("reward", "unaided", "analysis_prompt")', f"{REALIGNING} -k another_option"),
    Mutant("a tied head is sent beside its embedding", T + "hf_engine.py", ' and not (tied and name == "lm_head.weight")', "", f"{REALIGNING} -k weights_that"),
    Mutant("a realignment that kept nothing succeeds", ALIGN, "        if not kept:\n", "        if False:\n", f"{REALIGNING} -k nothing_is_left"),
    Mutant("the last rejected line is shown as the first", T + "realign_summary.py", "first.setdefault(reason, outcome)", "first[reason] = outcome", f"{REALIGNING} -k nothing_is_left"),
    Mutant("a splitter that nobody asked for is missed", T + "realign_summary.py", "if splitter and unsplit:", "if unsplit:", f"{REALIGNING} -k splitter"),
    # these start a real vLLM
    Mutant("the token after a repetition is part of the answer", HINTED + "decode.py", "half.logprobs[: report.drawn]", "half.logprobs", "tests/rollout/test_hinted_vllm.py -k repetition"),
    Mutant("the model's own end ends an answer", HINTED + "engine.py", '"ignore_eos": True', '"ignore_eos": False', "tests/rollout/test_hinted_vllm.py -k ends_both"),
]
