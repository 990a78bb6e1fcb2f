"""Peak memory of one training step of a GPT with a large vocabulary, in a process of its own:  python -m tests.hooks.attach_memory WAY TOKENS DTYPE

WAY: megatron (megatron-core's cross-entropy), two_pass or one_pass (an attached sft).  Prints {"peak_mib": beyond what was there before the step}.
"""

import json
import os
import sys
from pathlib import Path

VOCABULARY = 151_936


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main(way: str, tokens: int, dtype: str) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_plugin import attach
    from megatron_plugin.hooks.cpu_platform import cpu_platform
    from megatron_plugin.hooks.local_spec import local_block_spec

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with cpu_platform():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=1, hidden_size=32, num_attention_heads=2, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
            calculate_per_token_loss=True, finalize_model_grads_func=lambda *_: None,
            params_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        )  # fmt: skip
        model = GPTModel(
            config=config, transformer_layer_spec=local_block_spec(config), vocab_size=VOCABULARY, max_sequence_length=64, position_embedding_type="rope"
        ).to(config.params_dtype)
        ids = torch.randint(0, VOCABULARY, (tokens // 64, 65))
        place = torch.arange(64).expand(len(ids), 64)
        handle = attach(model, "sft", one_pass=way == "one_pass") if way != "megatron" else None

        def step(rows: slice) -> None:
            out = model(ids[rows, :-1], place[rows], None, labels=ids[rows, 1:])
            (handle.loss_func(out)[0] if handle else out.sum()).backward()

        step(slice(0, 1))  # gradients, libraries and thread pools are there before we look
        base = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        step(slice(None))
        print(json.dumps({"peak_mib": (_status("VmHWM") - base) / 2**20}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
