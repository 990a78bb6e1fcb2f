"""Plant one-line faults in a copy of the tree; the test named for each must fail.  A fault that survives is a hole in the suite.

    python tests/mutants.py [word ...]        only faults whose name holds a word; keeps the table tests/MUTANTS.md
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEEP = ("kernels", "csrc", "megatron_plugin", "tests", "examples", "configs", "pyproject.toml", "README.md", "requirements")
WORKERS = 2
TIMEOUT_S = 900


@dataclass(frozen=True)
class Mutant:
    name: str
    """What went wrong, as one would say it in a post-mortem."""
    file: str
    old: str
    new: str
    killer: str
    """pytest selection that must fail."""


OPS, STATS, BAD = "tests/test_ops.py", "tests/kernels/test_token_stats.py", "tests/kernels/test_bad_rows.py"
VOCAB, NORMALISER, OFFLINE = "tests/parallel/test_vocab.py", "tests/parallel/test_normaliser.py", "tests/kernels/test_compiled_offline.py"
TWINS, ONE_PASS = "tests/kernels/test_weighting.py", "tests/kernels/test_token_loss.py"
LINEAR, TRAINING, SPLIT = "tests/kernels/test_linear_token_loss.py", "tests/kernels/test_linear_training.py", "tests/parallel/test_linear.py"
DDP, CPU = "tests/hooks/test_main_grad.py", "tests/kernels/test_cpu_kernels.py"
GRAD_SCALE, PADDING, PROBE = "tests/kernels/test_grad_scale.py", "tests/kernels/test_padding.py", "tests/losses/test_probe.py"
W, WEIGHTS = "megatron_plugin/hooks/weights/", "tests/hooks/test_weights"
STEPS = "tests/hooks/test_attach_steps.py"
ATTACH, SELF, MOE = "tests/hooks/test_attach.py", "tests/hooks/test_self_test.py", "tests/parallel/test_moe_divisor.py"
LOSSES, LAYOUTS = "tests/losses", "tests/trainer/test_layouts.py"

MUTANTS = [
    Mutant("DFT's weight is differentiated", "megatron_plugin/losses/dft.py", "weight_T = stats.logp.detach().exp()", "weight_T = stats.logp.exp()", LOSSES),
    Mutant("CHORD's weight is p instead of p(1 - p)", "megatron_plugin/losses/chord.py", " * -torch.expm1(logp_T)", "", LOSSES),
    Mutant("CHORD's 1 - p cancels", "megatron_plugin/losses/chord.py", "-torch.expm1(logp_T)", "(1 - logp_T.exp())", LOSSES),
    Mutant("LUFFY's shaping is detached", "megatron_plugin/losses/luffy.py", "torch.sigmoid(stats.logp -", "torch.sigmoid(stats.logp.detach() + 0 * stats.logp -", LOSSES),
    Mutant("GRPO clips A > 0 from below", "megatron_plugin/losses/grpo.py", "ratio_T.clamp(max=1 + clip_high))", "ratio_T.clamp(1 - clip_low, 1 + clip_high))", LOSSES),
    Mutant("SRFT's entropy sign is the released code's", "megatron_plugin/losses/srft.py", "entropy_sign: float | Tensor = -1.0", "entropy_sign: float | Tensor = 1.0", LOSSES),
    Mutant("mu is off by one step", "megatron_plugin/schedules/mu.py", "(step - warmup_steps) / decay_steps", "(step + 1 - warmup_steps) / decay_steps", "tests/schedules"),
    Mutant("masked tokens reach the sum through NaN inputs", "megatron_plugin/losses/reduction.py", "loss_T = torch.where(live, terms.loss, 0.0)", "loss_T = terms.loss * live", OPS),
    Mutant("EAFT divides by the padded vocabulary", "megatron_plugin/ops/logits.py", "for_vocabulary(shard.vocab_size)", "for_vocabulary(logits.shape[-1])", OPS),
    Mutant("a coefficient of 0 does not mask the row", "megatron_plugin/ops/logits.py", "labels.masked_fill(inputs.coefficient == 0, ignore_index)", "labels", OPS),
    Mutant("logp formed as z - lse in fp32", "kernels/partials.py", "LN2 * (z_T * shard.scale2(work) - m2_T - log2_s_T)",
           "(z_T.float() * (shard.scale2(work) * LN2) - (LN2 * (m2_T + log2_s_T)).float()).double()", STATS),
    Mutant("the label is scaled by another rounding of log2 e than the row", "kernels/partials.py", "shard.scale2(work)", "shard.scale2(torch.float64)", STATS),
    Mutant("a stray label is -inf", "kernels/partials.py", "masked_fill(shard.stray(labels_T), math.nan)", "masked_fill(shard.stray(labels_T), -math.inf)", BAD),
    Mutant("t is not re-centred when shards merge", "kernels/partials.py", "(t_RT + shift_RT * LN2 * s_RT)", "t_RT", VOCAB),
    Mutant("t is not re-centred when the maximum moves (Triton)", "kernels/stats.py", "t = (t + s * shift) * rescale", "t = t * rescale", STATS),
    Mutant("NaN logits are dropped by the clamp", "kernels/row.py", ", propagate_nan=tl.PropagateNan.ALL", "", OFFLINE),
    Mutant("row offsets are 32-bit", "kernels/stats.py", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", BAD),
    Mutant("logits are loaded at any alignment", "kernels/stats.py", "tl.multiple_of(first + head, VEC)", "(first + head)", OFFLINE),
    Mutant("the gradient forgets the temperature", "kernels/grad.py", "p_scale = inv_temperature / s", "p_scale = 1.0 / s", STATS),
    Mutant("CHORD's 1 - p cancels in the kernel", "kernels/weighting.py", "tl.where(x > -0.5, -series, 1.0 - tl.exp(x))", "1.0 - tl.exp(x)", TWINS),
    Mutant("GRPO's gradient ignores the clip in the kernel", "kernels/weighting.py", "tl.where(clipped | (bounded != raw), 0.0, ratio)", "ratio", TWINS),
    Mutant("the coefficient misses the gradient in the kernel", "kernels/loss.py", "terms[1] * coef)", "terms[1])", ONE_PASS),
    Mutant("the entropy bonus misses the gradient in the kernel", "kernels/loss.py", "(terms[2] - bonus) * coef", "terms[2] * coef", ONE_PASS),
    Mutant("a stray label hides behind a clip", "kernels/loss.py", "tl.where(logp != logp, logp, terms[1] * coef)", "terms[1] * coef", ONE_PASS),
    Mutant("t is not re-centred when the kernel merges ranks", "kernels/loss.py", "(t_r + shift * LN2 * s_r)", "t_r", VOCAB),
    Mutant("the upstream scalar is dropped", "kernels/row_loss.py", "if factor.item() != 1.0:", "if False:", ONE_PASS),
    Mutant("overwritten logits look untouched to autograd", "kernels/token_loss.py", "torch.autograd.graph.increment_version(logits_TV)", "pass", ONE_PASS),
    Mutant("evaluation writes the gradient", "kernels/token_loss.py", "if torch.is_grad_enabled() and logits.requires_grad:", "if logits.requires_grad:", ONE_PASS),
    Mutant("a second backward hands out the gradient again", "kernels/token_loss.py", "if ctx.spent:", "if False:", ONE_PASS),
    Mutant("the label's column is rounded to bf16 before the 1 is added", "kernels/grad.py", "(a * (1.0 - p) + spread)",
           "(a * (1.0 - p.to(tl.bfloat16).to(tl.float32)) + spread)", STATS),
    Mutant("a dead row is multiplied by 0, not written as 0", "kernels/eager.py", "dx.masked_fill_(dead_T[tile_rows, None], 0.0)", "(dx * ~dead_T[tile_rows, None])", BAD),
    Mutant("padded columns enter the sum", "kernels/layout.py", "return max(0, min(logits.shape[1], self.vocab_size - self.vocab_start))", "return logits.shape[1]", VOCAB),
    Mutant("shards that overlap go unnoticed", "megatron_plugin/parallel/vocab.py", "fits = (start_R == ends_R - columns_R).all() & ", "fits = ", VOCAB),
    Mutant("dX is this rank's share", "megatron_plugin/parallel/hidden.py", "return Exchange(1, gather, reduce_dx=partial(_start_all_reduce, group))", "return Exchange(1, gather)", SPLIT),
    Mutant("chunks are sized by this rank's own shard", "megatron_plugin/ops/hidden.py", "workspace_row_bytes(-(-shard.vocab_size // ranks),", "workspace_row_bytes(V,", SPLIT + " -k unequal"),
    Mutant("terms differentiated in the forward start the recomputation", "megatron_plugin/losses/objective.py",
           "torch.enable_grad(), saving_as_it_is():", "torch.enable_grad():", ONE_PASS + " -k recomputed"),
    Mutant("min_weight drops the heavy tokens", "kernels/linear_token_loss.py", "(~(table[REACH] < min_weight))", "(table[REACH] < min_weight)", "tests/kernels/test_linear_rows.py"),
    Mutant("the softcap's derivative is forgotten", "kernels/head.py", "dz[tile] = bent.square_().neg_().add_(1.0).mul_(dz[tile])", "pass", LINEAR),
    Mutant("the next chunk's tokens get this one's inputs", "kernels/linear_token_loss.py", "objective.at(chunk.tokens), sweep", "objective.at(slice(0, chunk.size)), sweep", LINEAR),
    Mutant("dW is that of the last chunk", "kernels/weight_grad.py", "(assign_ if self._first else accumulate_)(self.total", "assign_(self.total", LINEAR),
    Mutant("a forward into main_grad is not booked", "kernels/main_grad.py", "self._pending += 1", "pass", TRAINING),
    Mutant("another scale than announced goes unnoticed", "kernels/main_grad.py", "self._strangers += strange", "pass", TRAINING),
    Mutant("the head's weight gets no gradient at all, DDP's hook nothing to see", "kernels/main_grad.py",
           "return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device, layout=torch.sparse_coo)", "return None", DDP),
    Mutant("C++: partials of a row's parts are added without rescaling", "csrc/token_stats_cpu.cpp", "const Partial p = moved(partials[i], sum.m2);",
           "const Partial p = partials[i];", CPU),
    Mutant("C++: the label's column is that of every other", "csrc/token_stats_cpu.cpp", "kernels.write_one[out_dtype](dx, y,", "if (0) kernels.write_one[out_dtype](dx, y,", CPU),
    Mutant("C++: a masked row is read", "csrc/token_stats_cpu.cpp", "const bool live = labels[row] != ignore_index && (", "const bool live = (", BAD),
    Mutant("a damaged object of native code is loaded", "kernels/build.py", "return hashlib.sha256(data[:-32]).digest() == data[-32:]", "return True",
           "tests/kernels/test_cpu_build.py"),
    Mutant("counts of one rank", "megatron_plugin/parallel/normaliser.py", "all_reduce_sum(totals, group).tolist()", "totals.tolist()", NORMALISER),
    Mutant("a sequence's length is divided out twice", "megatron_plugin/parallel/normaliser.py", "mask.sequence_tokens.double().reciprocal() / count.sequences",
           "mask.sequence_tokens.double().reciprocal() / count.tokens", NORMALISER),
    Mutant("N counts a source without a share", "megatron_plugin/parallel/normaliser.py", "(counts.expert.tokens if expert.share else 0)", "counts.expert.tokens", NORMALISER),
    Mutant("num_tokens counts masked tokens", "megatron_plugin/ops/logits.py", "loss_sum, live.sum(dtype=torch.int32), loss",
           "loss_sum, torch.ones_like(live).sum(dtype=torch.int32), loss", OPS),
    Mutant("labels are not shifted", "megatron_plugin/data/packing.py", "sample.labels_T[1:]\n", "sample.labels_T[:-1]\n", "tests/data"),
    Mutant("packed samples see each other", "megatron_plugin/data/packing.py", "~(same_bss & causal_ss)[:, None]", "~(same_bss | causal_ss)[:, None]", "tests/data"),
    Mutant("megatron-core's mean of means is accepted", "megatron_plugin/hooks/report.py", "if not config.calculate_per_token_loss:", "if False:", "tests/hooks/test_forward_step.py"),
    Mutant("norms are not tagged for sequence parallelism", "megatron_plugin/hooks/local_spec.py", "parameter.sequence_parallel = config.sequence_parallel",
           "parameter.sequence_parallel = False", LAYOUTS + " -k SP"),
    Mutant("a resumed run starts its data again", "megatron_plugin/trainer/supervised.py", 'self.order.load_state_dict(run.position)', "pass", LAYOUTS + " -k resumed"),
    Mutant("a resumed run has a fresh Adam", "megatron_plugin/trainer/run.py", "load_checkpoint(source, chunks, optimizer)", "load_checkpoint(source, chunks)",
           LAYOUTS + " -k resumed"),
    Mutant("the optimizer steps on NaN", "megatron_plugin/trainer/run.py", 'if not math.isfinite(means["lm loss"]):', "if False:", "tests/trainer/test_bad_input.py -k number"),
    Mutant("the optimizer steps on a NaN gradient", "megatron_plugin/trainer/run.py", "if not math.isfinite(grad_norm):", "if False:",
           "tests/trainer/test_bad_input.py -k gradient"),
    Mutant("hidden states are handed on without their gradient", "megatron_plugin/hooks/gpt_model.py", "            return input_, None", "            return input_.detach(), None", f"{ATTACH}::test_sft_is_the_models_own_loss_and_detach_leaves_no_trace"),
    Mutant("the main head gets the loss of the MTP heads", "megatron_plugin/hooks/gpt_model.py", "self.seen.is_mtp = self.seen.heads <= (self", "self.seen.is_mtp = self.seen.heads <= 1 + (self", ATTACH),
    Mutant("an input of another shape reaches other tokens", "megatron_plugin/hooks/head_loss.py", "        checked_inputs(self.inputs, self.labels)", "        pass", f"{ATTACH}::test_what_is_refused"),
    Mutant("MTP heads take the loss's temperature", "megatron_plugin/hooks/head_loss.py", "head = replace(self.head, temperature=1.0, vocab_size=None)", "head = self.head", f"{STEPS}::test_multi_token_prediction_heads_stay_plain"),
    Mutant("books of a wrapped function are kept twice", "megatron_plugin/hooks/books.py", "if mine is not None and there is not mine.finalize:", "if there is mine:", f"{STEPS}::test_the_books_of_main_grad_come_and_go"),
    Mutant("a checkpoint of another model loads", "megatron_plugin/hooks/dist_checkpoint.py", "if left_over or unexpected:", "if False:", "tests/trainer/test_checkpoint.py -k another_model"),
    Mutant("detach leaves the head's class", "megatron_plugin/hooks/gpt_model.py", "        head.__class__ = type(head).__bases__[1]\n", "", ATTACH),
    Mutant("data weights in a loss_mask are forgotten in two passes", "megatron_plugin/hooks/attach.py", "self._loss_mask = seen.loss_mask", "self._loss_mask = None", "tests/hooks/test_attach.py::test_masks_and_weights"),
    Mutant("labels in the batch's order, hidden states in the sequence's", "megatron_plugin/hooks/head_loss.py", "tokens.masked_labels().t().contiguous(), tokens", "tokens.masked_labels().contiguous().view(tokens.labels.shape[::-1]), tokens", ATTACH),
    Mutant("the loss scale is not told", "megatron_plugin/hooks/report.py", "scale = config.grad_scale_func(torch.ones((), device=device))", "scale = 1.0", f"{STEPS}::test_half_precision_under_the_wrappers"),
    Mutant("the books of main_grad are never closed", "megatron_plugin/hooks/books.py", "            ledger.finalize()", "            pass", f"{STEPS}::test_a_dropped_forward_is_found"),
    Mutant("context-parallel slices are not zig-zag", "megatron_plugin/parallel/context.py", "(pieces[rank], pieces[-1 - rank])", "(pieces[2 * rank], pieces[2 * rank + 1])", "tests/parallel/test_context.py"),
    Mutant("the self-test reads a gradient another rank reduced", "megatron_plugin/hooks/self_test.py", "owned = not sharded or dist.get_rank(groups[0]) == 0", "owned = True", f"{SELF} -k PP2xDP2"),
    Mutant("the self-test changes the user's config", "megatron_plugin/hooks/self_test.py", "probe = copy.copy(config)", "probe = config", f"{SELF} -k one"),
    Mutant("the self-test keeps the user's callbacks", "megatron_plugin/hooks/self_test.py", "timers=None, grad_scale_func=None,", "timers=None,", f"{SELF} -k DP2"),
    Mutant("the self-test leaves out the steady state of interleaving", "megatron_plugin/hooks/self_test.py", "(self.pipeline, 2 * self.pipeline)", "(self.pipeline, self.pipeline)", f"{SELF} -k batched_messages"),
    Mutant("ranks judge the self-test for themselves", "megatron_plugin/hooks/self_test.py", "    for group in groups:", "    for group in groups[:0]:", f"{SELF} -k wrong_factor"),
    Mutant("the self-test ignores the loss scale", "megatron_plugin/hooks/self_test.py", "probe_config.grad_scale_func = partial(torch.mul, LOSS_SCALE)", "pass", f"{SELF} -k fp16"),
    Mutant("the self-test's masks are equal", "megatron_plugin/hooks/self_test.py", "return 5 * (rank + index) % POSITIONS", "return 5", f"{SELF} -k 'own_mean or flag or clamp'"),
    Mutant("segments of different rows are one sequence", "megatron_plugin/parallel/normaliser.py", "rows * (ids.max() + 1) + ids", "ids", f"{NORMALISER} -k 'sequence_tokens or packed'"),
    Mutant("a sequence's length counts untrained tokens", "megatron_plugin/parallel/normaliser.py", "live.long().flatten())", "torch.ones_like(place).flatten())", f"{NORMALISER} -k sequence_tokens"),
    Mutant("lengths of another batch go unnoticed", "megatron_plugin/parallel/normaliser.py", "not isinstance(count.sequences, int)", "count.sequences is None", f"{NORMALISER} -k count_something_else"),
    Mutant("N counts loss tokens under MoE", "megatron_plugin/parallel/normaliser.py", "    return real_tokens\n", "    return loss_tokens\n", MOE),
    Mutant("N counts all tokens without an auxiliary loss", "megatron_plugin/parallel/normaliser.py", "and weighted):", "):", MOE),
    Mutant("keys and values exchanged in linear_qkv", W + "slices.py", "(1, group * d, (group + 1) * d), (2, group * d, (group + 1) * d)]", "(2, group * d, (group + 1) * d), (1, group * d, (group + 1) * d)]", f"{WEIGHTS}.py -k untied"),
    Mutant("gate and up exchanged", W + "slices.py", "part * half) for part in (0, 1)]", "(1 - part) * half) for part in (0, 1)]", f"{WEIGHTS}.py -k untied"),
    Mutant("imported vocabulary padding keeps its random rows", W + "convert.py", "shard.zero_()  # the rest is vocabulary padding", "pass", f"{WEIGHTS}.py -k untied"),
    Mutant("layers are counted per virtual chunk", W + "model.py", "words[2] = str(layers[int(words[2])])", "words[2] = str(int(words[2]))", f"{WEIGHTS}.py -k VPP"),
    Mutant("a layer's two norms are exchanged", W + "names.py", '"pre_mlp_layernorm.weight": "post_attention_layernorm"', '"pre_mlp_layernorm.weight": "input_layernorm"', f"{WEIGHTS}.py -k untied"),
    Mutant("rotary settings of the built model are not compared", W + "model.py", "wrong += _rotary_differences(chunk, fields)", "pass", f"{WEIGHTS}_bad_input.py -k another_shape"),
    Mutant("transformers 5's rotary base is not read", W + "hf_config.py", 'float(rope.get("rope_theta") or hf_config.get("rope_theta")', 'float(hf_config.get("rope_theta")', f"{WEIGHTS}_names.py -k fields_of"),
    Mutant("every rank reads whole tensors", W + "convert.py", "reader.read(rule.parts[piece.part].name, axis(rule), piece.start, piece.stop)", "reader.read(rule.parts[piece.part].name, axis(rule), 0, 1 << 40).narrow(axis(rule), piece.start, piece.stop - piece.start)", f"{WEIGHTS}.py -k slices"),
    Mutant("an import error of one rank stays there", W + "exchange.py", "next((text for text in said if text), None)", "failure", f"{WEIGHTS}_bad_input.py -k one_rank"),
    Mutant("unexpected Hugging Face tensors are dropped", W + "files.py", "if unexpected:", "if False:", f"{WEIGHTS}_bad_input.py -k named_with"),
    Mutant("the embedding is padded to the tokenizer only", "megatron_plugin/trainer/convert.py", "while -(-tokens // multiple) * multiple < rows:", "while False:", f"{WEIGHTS}_cli.py -k what_an_import"),
    Mutant('the scale kernel turns masked zeros into NaN (PyTorch)', 'kernels/row_loss.py', 'rows.copy_(torch.where(rows == 0, 0.0, rows * factor))', 'rows.mul_(factor)', GRAD_SCALE),
    Mutant('the scale kernel turns masked zeros into NaN (Triton)', 'kernels/scale.py', 'tl.where(value == 0.0, 0.0, value * factor)', 'value * factor', GRAD_SCALE),
    Mutant('grad_scale does not reach the kernel', 'megatron_plugin/ops/logits.py', 'objective_of(loss, flat, grad_scale=grad_scale)', 'objective_of(loss, flat)', GRAD_SCALE),
    Mutant('the backward brings grad_scale once more', 'kernels/token_loss.py', 'd_loss / ctx.grad_scale', 'd_loss', GRAD_SCALE),
    Mutant('a loss scaler changes grad_scale after the forward', 'kernels/token_loss.py', 'objective.grad_scale.clone() if isinstance(objective.grad_scale, Tensor) else objective.grad_scale', 'objective.grad_scale', GRAD_SCALE),
    Mutant("NaN in padding rows of the head's weight reaches dX", 'kernels/head.py', 'return cls(real, min(weight.shape[0], -(-real // align) * align))', 'return cls(weight.shape[0], weight.shape[0])', PADDING),
    Mutant("the last padded columns keep the weight's NaN", 'kernels/head.py', 'self._last[columns.real - columns.wide :] = 0.0', 'pass', PADDING),
    Mutant('logits beyond what fp32 can refer to are finite and wrong', 'kernels/partials.py', 's_T = s_T.masked_fill(m2_T.abs() >= FAR[work], math.nan)', 'pass', BAD),
    Mutant('logits beyond what fp32 can refer to (one launch)', 'kernels/loss.py', 'tl.where(tl.abs(m2) >= FAR, float("nan"), s)', 's', ONE_PASS),
    Mutant('a block of -1e30 columns makes a row NaN (Triton)', 'kernels/row.py', 'EMPTY = tl.constexpr(-(2.0**31))', 'EMPTY = tl.constexpr(-1e30)', BAD),
    Mutant('a block of -1e30 columns makes a row NaN (C++)', 'csrc/token_stats_cpu.cpp', 'EMPTY = -0x1p31f', 'EMPTY = -1e30f', BAD),
    Mutant('a parameter that requires a gradient loses it', 'megatron_plugin/losses/objective.py', 'value.requires_grad and torch.is_grad_enabled()', 'False', OPS),
    Mutant('a loss with weights of its own runs in one pass', 'megatron_plugin/losses/probe.py', 'return local and not _has_weights(tried)', 'return local', PROBE),
    Mutant('a loss without a twin is tried on every call', 'megatron_plugin/losses/probe.py', 'loss.tried[given] = loss.fn, names', 'pass', PROBE),
    Mutant("another source's library is loaded", 'kernels/build.py', 'folder.glob(f"{made_of}-*.so")', 'folder.glob("*.so")', 'tests/kernels/test_cpu_build.py'),
    Mutant('the temperature is not rounded as the kernels round it', 'kernels/layout.py', 'return shifted - (shifted - factor)', 'return factor', STATS),
    Mutant('fp64 logits go through fp32 when Triton is forced', 'kernels/backend.py', 'if logits.dtype == torch.float64:', 'if False:', 'tests/kernels/test_backend.py'),
    Mutant("context_gather keeps one rank's share of a token's gradient", 'megatron_plugin/parallel/context.py', 'reduce_scatter(mine, scattered, group=ctx.group)', 'mine.copy_(scattered.chunk(ranks)[dist.get_rank(ctx.group)])', 'tests/parallel/test_context.py -k gradient_of_a_token'),
    Mutant('pieces of context-parallel ranks come back in another order', 'megatron_plugin/parallel/context.py', '*reversed(pieces[1::2])', '*pieces[1::2]', 'tests/parallel/test_context.py -k there_and_back'),
    Mutant('queries of a context-parallel slice count from 0', 'megatron_plugin/hooks/local_attention.py', 'context_slice(causal_ss, 0, self.cp_group)[None, None]', 'causal_ss[:length][None, None]', 'tests/hooks/test_local_attention.py'),
    Mutant('the trainer cuts rows into halves, attention expects zig-zag', 'megatron_plugin/trainer/step.py', 'context_slice(x, 1, context)', 'x.chunk(context.size(), 1)[context.rank()]', 'tests/trainer/test_layouts.py -k CP2'),
    Mutant('two interleaved stages batch their messages', 'megatron_plugin/hooks/mcore.py', 'fields = {"overlap_p2p_comm": True, "batch_p2p_comm": False} | fields', 'pass', 'tests/hooks/test_mcore.py -k interleaved'),
    Mutant("a checkpoint's optimizer state is not loaded", 'megatron_plugin/hooks/dist_checkpoint.py', '    _load(optimizer, state)', '    pass', 'tests/trainer/test_checkpoint.py -k TP2xPP2'),
    Mutant('all parameters share one step tensor', 'megatron_plugin/hooks/dist_checkpoint.py', 'torch.tensor(0.0)).clone()', 'torch.tensor(0.0))', 'tests/trainer/test_checkpoint.py -k TP1'),
    Mutant("Adam's step count is lost on the way to a plain optimizer", 'megatron_plugin/hooks/dist_checkpoint.py', 'torch.tensor(float(saved["optimizer"]["param_groups"][0]["step"]))', 'torch.tensor(1.0)', 'tests/trainer/test_checkpoint.py -k DP2xCP2'),
    Mutant('only ImportError is expected of Transformer Engine', 'megatron_plugin/hooks/accelerators.py', 'except Exception as error:  # RuntimeError of the empty', 'except ImportError as error:  # RuntimeError of the empty', 'tests/hooks/test_accelerators.py -k impossible'),
    Mutant("any apex passes for NVIDIA's", 'megatron_plugin/hooks/accelerators.py', 'if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):', 'if not folders:', 'tests/hooks/test_accelerators.py -k not_the_one'),
    Mutant('a drop-in attaches at every forward', 'megatron_plugin/hooks/dropins/schedule.py', 'if model not in handles:', 'if True:', 'tests/hooks/test_dropins.py -k our_loss'),
    Mutant("the script's loss_func is kept in one pass", 'megatron_plugin/hooks/dropins/schedule.py', 'handle.loss_func if handle.one_pass else functools', 'functools', 'tests/hooks/test_dropins.py -k our_loss'),
    Mutant('a plugin file is not checked when the arguments are', 'megatron_plugin/hooks/dropins/megatron_lm.py', '        options_of(path)\n    except', '        pass\n    except', 'tests/hooks/test_dropins.py -k mistakes'),
    Mutant("TRL's labels are not shifted", 'megatron_plugin/hooks/dropins/trl.py', '[:, 1:]', '[:, :-1]', 'tests/hooks/test_dropins_trl.py'),
    Mutant("TRL's loss is divided by the micro-batch", 'megatron_plugin/hooks/dropins/trl.py', 'if num_items_in_batch is None else', 'if True else', 'tests/hooks/test_dropins_trl.py'),
    Mutant('doctor compares versions as text', 'megatron_plugin/doctor.py', '_minor(found) < OLDEST_TORCH', "found < '2.6'", 'tests/test_doctor.py'),
    Mutant('doctor is content with what is broken', 'megatron_plugin/doctor.py', 'if broken:', 'if not broken:', 'tests/test_doctor.py -k exits'),
]


def _copy() -> Path:
    copy = Path(tempfile.mkdtemp(prefix="mutant-"))
    for name in KEEP:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


def _pytest(tree: Path, selection: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *shlex.split(selection)]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)


def _failed_test(output: str) -> str | None:
    return next((line.split(" - ")[0].split(" ", 1)[1] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))), None)


def run(mutant: Mutant) -> str | None:
    """The test that killed the mutant, or None if it survived.  AssertionError when the fault cannot be planted."""
    tree = _copy()
    try:
        target = tree / mutant.file
        text = target.read_text()
        assert text.count(mutant.old) >= 1, f"{mutant.name}: {mutant.file} no longer holds {mutant.old!r}"
        target.write_text(text.replace(mutant.old, mutant.new))
        result = _pytest(tree, mutant.killer)
        if result.returncode < 0:  # a wild pointer ends the interpreter, and with it the test run
            return f"{mutant.killer} (crashed with signal {-result.returncode})"
        return _failed_test(result.stdout) if result.returncode == 1 else None
    except subprocess.TimeoutExpired:
        return None
    finally:
        shutil.rmtree(tree)


TABLE = ROOT / "tests" / "MUTANTS.md"


def _write_table(killers: dict[str, str]) -> None:
    """Rows of the faults that were run, over those of earlier runs; a fault that no longer exists leaves the table."""
    rows = dict(re.findall(r"^\| (.+?) \| \S+ \| `(.+?)` \|$", TABLE.read_text(), re.M)) if TABLE.exists() else {}
    rows |= {name: killer.split("[")[0] for name, killer in killers.items()}
    lines = ["# Planted faults and the test that catches each", "", "Written by `tests/mutants.py`.", "", "| fault | planted in | killed by |", "|---|---|---|"]
    lines += [f"| {m.name} | {m.file} | `{rows.get(m.name, 'not run')}` |" for m in MUTANTS]
    TABLE.write_text("\n".join(lines) + "\n")


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(w in m.name for w in words)]
    tree = _copy()
    where = subprocess.run([sys.executable, "-c", "import megatron_plugin; print(megatron_plugin.__file__)"], cwd=tree, text=True,
                           env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, check=True).stdout
    assert str(tree) in where, f"the copy is not what is imported: {where}"
    selections = sorted({m.killer.split(" -k ")[0] for m in chosen})
    clean = _pytest(tree, " ".join(selections))
    shutil.rmtree(tree)
    if clean.returncode != 0:
        print(f"without any fault {_failed_test(clean.stdout)} fails: nothing can be learnt\n{clean.stdout[-2000:]}")
        return 1
    with ThreadPoolExecutor(WORKERS) as pool:
        killers = []
        for mutant, killer in zip(chosen, pool.map(run, chosen), strict=True):
            killers.append(killer)
            print(f"{'killed  ' if killer else 'SURVIVED'}  {mutant.name}  {killer or mutant.killer}", flush=True)
    survivors = sum(killer is None for killer in killers)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed", flush=True)
    _write_table({m.name: killer or "SURVIVED" for m, killer in zip(chosen, killers, strict=True)})
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
