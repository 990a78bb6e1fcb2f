"""Tiny random Hugging Face models in which no two tensors, and no norm or bias, could be exchanged unnoticed."""

import torch
from safetensors.torch import load_file

VOCABULARY = 99
SIZES = dict(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
             max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_theta=500_000.0)
# two groups per rank under TP2; Qwen3's heads are wider than hidden / heads
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", dict(rope_theta=10_000.0)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", dict(rope_theta=1_000_000.0)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(head_dim=16, rope_theta=1_000_000.0)),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", dict(head_dim=16, rope_parameters=LLAMA3, max_position_embeddings=16384)),
}


def save(folder, kind, *, dtype=torch.float32, seed=0, shard="60KB", **sizes):
    """A model of `kind` in `folder`; returns it in eval mode."""
    import transformers

    cls, config, fields = KINDS[kind]
    model = getattr(transformers, cls)(getattr(transformers, config)(**SIZES | fields | sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.15 if parameter.ndim > 1 else 0.3))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(1)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def tensors_in(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(ours: dict, truth: dict) -> None:
    """Names, dtypes, shapes and bits."""
    assert ours.keys() == truth.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == truth[name].dtype and torch.equal(tensor, truth[name]), name
