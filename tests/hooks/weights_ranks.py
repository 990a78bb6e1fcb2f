"""What the rank processes of tests/hooks/test_weights*.py run: a bare GPTModel built from config.json, loaded, asked for logits, written back."""

import contextlib
import io
import os
import sys
import types
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

warnings.filterwarnings("ignore", module=r"megatron\.core")
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402

from megatron_plugin.hooks.cpu_platform import cpu_platform  # noqa: E402
from megatron_plugin.hooks.local_spec import local_block_spec  # noqa: E402
from megatron_plugin.hooks.mcore import forward_backward, gpt_chunks, make_config  # noqa: E402
from megatron_plugin.hooks.weights import WeightsError, export_hf, hf_tensors, import_hf, read_hf_config, transformer_fields  # noqa: E402
from megatron_plugin.hooks.weights.exchange import together  # noqa: E402

PADDED = 112  # HF has 99 rows: on two ranks the second shard is part padding, on four the last one


@contextlib.contextmanager
def layout(tensor=1, pipeline=1, virtual=1):
    with contextlib.redirect_stdout(io.StringIO()), cpu_platform():
        parallel_state.initialize_model_parallel(tensor, pipeline, virtual if virtual > 1 else None)
        torch.manual_seed(7 + dist.get_rank())  # so that a weight that is not loaded differs everywhere
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


class NormedLinear(ColumnParallelLinear):
    """What Transformer Engine's LayerNormColumnParallelLinear is, in torch: RMSNorm and linear layer in one, under its parameter names."""

    def __init__(self, input_size, output_size, *, config, **arguments):
        super().__init__(input_size, output_size, config=config, **arguments)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.eps = config.layernorm_epsilon

    def forward(self, input_, *arguments, **options):
        return super().forward(F.rms_norm(input_, input_.shape[-1:], self.layer_norm_weight, self.eps), *arguments, **options)


def te_named_spec(config, *, vp_stage=None):
    """The layers under Transformer Engine's names, which no CPU can build with Transformer Engine itself."""

    def renamed(layer):
        inner = layer.submodules
        attention = replace(inner.self_attention, submodules=replace(inner.self_attention.submodules, linear_qkv=NormedLinear))
        mlp = replace(inner.mlp, submodules=replace(inner.mlp.submodules, linear_fc1=NormedLinear))
        inner = replace(inner, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp, self_attention=attention, mlp=mlp)
        return replace(layer, submodules=inner)

    block = local_block_spec(config, vp_stage=vp_stage)
    return replace(block, layer_specs=[renamed(layer) for layer in block.layer_specs])


def chunks_of(fields, *, tensor=1, pipeline=1, virtual=1, dtype=torch.float32, padded=PADDED, change=None, te_names=False):
    """This rank's GPTModels.  `change`: fields that are built in another way than config.json says."""
    change = change or {}
    gpt = fields.gpt | {k: v for k, v in change.items() if k in (*fields.gpt, "rope_scaling_factor")}
    config = make_config(
        **fields.transformer_arguments() | {k: v for k, v in change.items() if k not in gpt}, tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None, pipeline_dtype=dtype,
        params_dtype=dtype,
    )  # fmt: skip
    spec = te_named_spec if te_names else local_block_spec
    return [chunk.to(dtype) for chunk in gpt_chunks(config, spec, vocab_size=padded, max_sequence_length=fields.max_positions, **gpt)]


def logits_of(chunks, tokens):
    """[b, s, padded V] of the last stage, None on the others; through megatron-core's own schedule."""

    def forward_step(batches, model):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(next(batches), positions, None), lambda output, non_loss_data: output

    for chunk in chunks:
        chunk.eval()
    out = forward_backward(forward_step, [tokens] * 2, chunks, shape=tokens.shape, train=False, collect=True)
    if not out:
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(out[0]) for _ in range(group.size())]
    dist.all_gather(parts, out[0].contiguous(), group=group)
    return torch.cat(parts, -1)


def round_trip(group, *, source, target, tokens=None, dtype="float32", export_dtype=None, file_bytes=1 << 40, te_names=False, **sizes):
    """Import, logits, every tensor on every rank and on rank 0 alone, export.  (bytes read, logits, {name: tensor}, names on this rank alone)"""
    dtype = getattr(torch, dtype)
    fields = transformer_fields(read_hf_config(source))
    with layout(**sizes):
        chunks = chunks_of(fields, dtype=dtype, te_names=te_names, **sizes)
        read = import_hf(chunks, source)
        padding = [chunk.embedding.word_embeddings.weight[fields.vocab_size - PADDED :].abs().max() for chunk in chunks if _last_shard(chunk)]
        assert not any(padding), "padded rows are not zero"
        logits = logits_of(chunks, tokens) if tokens is not None else None
        everywhere = {name: tensor.clone() for name, tensor in hf_tensors(chunks, vocab_size=fields.vocab_size)}
        on_the_last = [name for name, _ in hf_tensors(chunks, vocab_size=fields.vocab_size, to=group.size() - 1)]
        export_dtype = getattr(torch, export_dtype) if export_dtype else None
        export_hf(chunks, target, like=source, dtype=export_dtype, file_bytes=file_bytes)
    return read, logits, everywhere, on_the_last


def _last_shard(chunk):
    return chunk.pre_process and parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_tensor_model_parallel_world_size() - 1


def refusal(group, *, source, target=None, change=None, tensor=1, pipeline=1, padded=PADDED):
    """Text of the WeightsError of an import (or of an export, if there is a target), and whether a weight was touched before."""
    fields = transformer_fields(read_hf_config(source))
    with layout(tensor, pipeline):
        try:
            chunks = chunks_of(fields, tensor=tensor, pipeline=pipeline, padded=padded, change=change)
            before = [p.clone() for chunk in chunks for p in chunk.parameters()]
            if target:
                export_hf(chunks, target, like=source)
            else:
                import_hf(chunks, source)
        except WeightsError as error:
            after = [p for chunk in chunks for p in chunk.parameters()]
            return str(error), all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    return None, None


def frequencies(group, *, source):
    with layout():
        return chunks_of(transformer_fields(read_hf_config(source)))[0].rotary_pos_emb.inv_freq


def command(group, *, arguments):
    """`megatron-plugin ...` as torchrun would start it on this many ranks; its exit code and what it said."""
    from megatron_plugin import cli

    os.environ["WORLD_SIZE"] = str(group.size())
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return cli.main([str(a) for a in arguments]), said.getvalue()
    finally:
        del os.environ["WORLD_SIZE"]


def checkpoint_tensors(group, *, run_dir, vocab_size, tokens):
    """(whole tensors, logits) of a run's newest checkpoint, loaded on one rank by the trainer."""
    from megatron_plugin.config import load_config
    from megatron_plugin.trainer.checkpoint import find_checkpoint, load_checkpoint, read_state
    from megatron_plugin.trainer.model import build_model, transformer_config

    config = load_config(Path(run_dir) / "config.yaml", ["parallel.tensor=1", "parallel.sequence=false"], world_size=1)
    with layout():
        checkpoint = find_checkpoint(run_dir)
        chunks = build_model(config, transformer_config(config), read_state(checkpoint)["vocab_size"])
        load_checkpoint(checkpoint, chunks)
        mask = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()[None, None]
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            logits = chunks[0](tokens, torch.arange(tokens.shape[1]).expand_as(tokens), mask)
        return {name: tensor.clone() for name, tensor in hf_tensors(chunks, vocab_size=vocab_size)}, logits


def incomplete(group, *, source):
    """Text of the error when one virtual chunk is left out."""
    fields = transformer_fields(read_hf_config(source))
    with layout(1, 2, 2):
        chunks = chunks_of(fields, pipeline=2, virtual=2)
        try:
            list(hf_tensors(chunks[:1], vocab_size=fields.vocab_size))
        except WeightsError as error:
            return str(error)


def most_alive(group, *, source):
    """Largest number of whole tensors that exist at once while all are looked at, and how many there are."""
    fields = transformer_fields(read_hf_config(source))
    with layout(2):
        chunks, seen, most = chunks_of(fields, tensor=2), [], 0
        for _, tensor in hf_tensors(chunks, vocab_size=fields.vocab_size):
            seen.append(weakref.ref(tensor))
            del tensor
            most = max(most, sum(reference() is not None for reference in seen))
        return most, len(seen)


def fails_on_rank_1(group):
    def check():
        if dist.get_rank() == 1:
            raise WeightsError("only here")

    try:
        together(check)
    except WeightsError as error:
        return str(error)


class StandInBridge:
    """Records what AutoBridge would be asked."""

    asked = []

    @classmethod
    def from_hf_pretrained(cls, path):
        cls.asked = [("from_hf_pretrained", path)]
        return cls()

    def load_hf_weights(self, models):
        self.asked.append(("load_hf_weights", [type(m).__name__ for m in models]))

    def export_hf_weights(self, models, show_progress):
        self.asked.append(("export_hf_weights", [type(m).__name__ for m in models]))
        yield "a", torch.ones(1)

    def save_hf_pretrained(self, models, path, show_progress):
        self.asked.append(("save_hf_pretrained", path))


def with_bridge(group, *, source, target):
    """What each function asks of Megatron-Bridge when it imports: for Transformer Engine's names, with backend="own", for local names; and the
    refusal of backend="bridge" for local names."""
    module = types.ModuleType("megatron.bridge")
    module.AutoBridge = StandInBridge
    sys.modules[module.__name__] = module
    fields, answers = transformer_fields(read_hf_config(source)), []
    try:
        with layout():
            te, local = chunks_of(fields, te_names=True), chunks_of(fields)
            for i, (chunks, backend) in enumerate([(te, "auto"), (te, "own"), (local, "auto")]):
                answers.append([])
                for call in (
                    lambda: import_hf(chunks, source, backend=backend),  # noqa: B023
                    lambda: [name for name, _ in hf_tensors(chunks, like=source, backend=backend)],  # noqa: B023
                    lambda: export_hf(chunks, f"{target}{i}", like=source, backend=backend),  # noqa: B023
                ):
                    StandInBridge.asked = []
                    call()
                    answers[-1].append(StandInBridge.asked)
            try:
                import_hf(local, source, backend="bridge")
            except WeightsError as error:
                answers.append(str(error))
    finally:
        del sys.modules[module.__name__]
    return answers
