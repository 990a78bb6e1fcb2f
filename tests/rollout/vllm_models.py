"""Tiny models for a real vLLM, and what Hugging Face's own forward says about completions.  No tokenizer: everything is token ids."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

CLASSES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
VOCABULARY, END = 320, 257
LOGP = 1e-4  # nats, engine against Hugging Face's forward in fp32, both on a CPU; measured 4.7e-5 (prompts of 300 tokens, untied)
PROMPT = [(7 * i) % 250 for i in range(300)]  # two full blocks of the prefix cache (128 tokens on a CPU): a cache that is not emptied shows


def config_of(kind, *, tied=False, **fields):
    """Of a model of 0.3 M parameters, with biases (qwen2) or norms of queries and keys (qwen3) that a careless update forgets."""
    values = dict(vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
                  max_position_embeddings=512, initializer_range=0.2, eos_token_id=END, pad_token_id=256, bos_token_id=None)  # fmt: skip
    values |= {"head_dim": 32} if kind == "qwen3" else {}
    return CLASSES[kind][0](**values | fields, tie_word_embeddings=tied, architectures=[CLASSES[kind][1].__name__])


def make_model(folder, kind, *, tied=False, **fields):
    """The model in fp32; `folder` gets its config.json, which is all that an engine starts from."""
    torch.manual_seed(0)
    config = config_of(kind, tied=tied, **fields)
    config.save_pretrained(folder)
    model = CLASSES[kind][1](config).float().eval()
    model.noise = torch.Generator().manual_seed(1)  # its own: tests begin with the same seed, and must not repeat each other's weights
    model.start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return model


def change(model, size=0.05):
    """Other values for every parameter, biases and norms too.  Around the first ones: steps that add up make logits, and their rounding, grow."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model.start[name] + size * torch.randn(parameter.shape, generator=model.noise))


def weights_of(model):
    """[(name, tensor)] of a checkpoint: without the head where it is tied."""
    return [(n, t) for n, t in model.state_dict().items() if not (n == "lm_head.weight" and model.config.tie_word_embeddings)]


def worst_error(model, prompt, completions, temperature=1.0):
    """Largest |log-probability of the completions - Hugging Face's|, nats."""
    worst = 0.0
    for completion in completions:
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
        truth = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        worst = max(worst, (torch.tensor(completion.logprobs) - truth).abs().max().item())
    return worst
