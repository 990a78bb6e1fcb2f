"""A tiny model, its tokenizer and prompts for hinted decoding, and what Hugging Face's forward says about answers."""

import torch

from megatron_plugin.data import train_tokenizer, true_vocab_size
from megatron_plugin.rollout.hinted.decode import HintedPrompt
from megatron_plugin.rollout.hinted.lockstep import mixed_distributions
from megatron_plugin.rollout.hinted.options import HintedOptions
from tests.rollout.vllm_models import make_model

TEXTS = ["the quick brown fox jumps over the lazy dog. 1 + 2 = 3 and so \\boxed{3}", "é ü 漢字 → 😀 ä ö é é ü"] * 3
LOGP = 1e-4  # nats: the bound.  Measured 4.5e-5, engine against fp64 of Hugging Face's fp32 logits, prompts of up to 45 tokens


class HintedBench:
    """vocab_size is below the model's 320 columns, as with a padded vocabulary."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = train_tokenizer(TEXTS, folder / "tokenizer", vocab_size=300)
        self.vocab_size = true_vocab_size(self.tokenizer)
        self.end = self.tokenizer.eos_token_id
        self.model = make_model(folder, "qwen2", eos_token_id=self.end, pad_token_id=self.tokenizer.pad_token_id)

    def options(self, **fields):
        defaults = dict(vocab_size=self.vocab_size, end_ids=(self.end,), max_tokens=24, temperature=1.0, splitter="", beta=1.0)
        return HintedOptions(**defaults | fields)

    def prompts(self, count, name="p"):
        """Questions of 10 to 16 tokens; the hinted ones have 30 to 40 more before them."""
        draw = torch.Generator().manual_seed(3)
        made = []
        for i in range(count):
            plain = torch.randint(7, self.vocab_size, (10 + i % 7,), generator=draw).tolist()
            made.append(HintedPrompt(f"{name}{i}", plain, torch.randint(7, self.vocab_size, (30 + i % 11,), generator=draw).tolist() + plain))
        return made

    def truth(self, prompt, tokens, options):
        """[T, V] log-probabilities that `tokens` were to be drawn from."""
        return mixed_distributions(self.model, prompt.plain_ids, prompt.hinted_ids, list(tokens), options, self.tokenizer).log()

    def error(self, prompt, sample, options):
        """Largest |log-probability told - the truth|, nats."""
        truth = self.truth(prompt, sample.token_ids, options)[range(len(sample.token_ids)), list(sample.token_ids)]
        return (truth - torch.tensor(sample.logp, dtype=truth.dtype)).abs().max().item()
