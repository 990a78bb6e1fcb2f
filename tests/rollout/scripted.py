"""A model that says what a test tells it, as engine and decoder of a realignment in one.  No vLLM, no pairs."""

from dataclasses import dataclass, field

from megatron_plugin.rollout.engine import Completion, EngineError, EngineLostError, Health
from megatron_plugin.rollout.hinted.decode import HintedRun, HintedSample
from megatron_plugin.rollout.hinted.engine import PairLimits
from megatron_plugin.rollout.hinted.options import HintedOptions
from megatron_plugin.rollout.hinted.stops import EndReason


@dataclass
class Scripted:
    """Engine and decoder.  alone, analysis, hinted: question -> what the model writes; a Completion's or sample's end with it."""

    tokenizer: object
    alone: dict = field(default_factory=dict)
    analysis: dict = field(default_factory=dict)
    hinted: dict = field(default_factory=dict)
    name: str = "scripted"
    weight_version: int = 1
    max_model_len: int = 2000
    timeout_s: float = 10.0
    asked: list = field(default_factory=list)
    lost: bool = False

    def __post_init__(self):
        self.engine, self.limits = self, PairLimits(max_num_seqs=8, max_num_batched_tokens=9, policy="", chunked_prefill=False, kv_blocks=1, block_size=1, vocabulary="")
        self.options = HintedOptions(vocab_size=300, end_ids=(self.tokenizer.eos_token_id,))

    def health(self):
        return Health.DEAD if self.lost else Health.HEALTHY

    def _question(self, ids):
        return next(line for line in self.tokenizer.decode(list(ids), skip_special_tokens=True).splitlines() if "What is" in line).removeprefix("Question:").strip()

    def generate(self, prompt_ids, params, *, timeout_s):
        if self.lost:
            raise EngineLostError("gone")
        text = self.tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
        question, shown = self._question(prompt_ids), "Reference answer:" in text
        self.asked.append(("analysis" if shown else "alone", question))
        assert params.stop_token_ids == self.options.end_ids and (not shown or params.temperature == 0)
        said = (self.analysis if shown else self.alone).get(question, "no idea")
        if said is None:
            raise EngineError("refused by the engine")
        said, reason = said if isinstance(said, tuple) else (said, "stop")
        ids = self.tokenizer.encode(said, add_special_tokens=False) + ([self.tokenizer.eos_token_id] if reason == "stop" else [])
        return [Completion(tuple(ids), (0.0,) * len(ids), reason, 1)]

    def run(self, prompts):
        run = HintedRun()
        for prompt in prompts:
            question = self._question(prompt.plain_ids)
            self.asked.append(("hinted", question, prompt.key, self.tokenizer.decode(list(prompt.hinted_ids))))
            said = self.hinted.get(question, "#### 0")
            if said is None:
                run.rejected[prompt.key] = "fell out of step"
                continue
            said, reason = said if isinstance(said, tuple) else (said, EndReason.EOS)
            letters = [i for letter in said for i in self.tokenizer.encode(letter, add_special_tokens=False)]  # a role's mark is letters, too
            ids = (*letters, self.tokenizer.eos_token_id)
            run.samples[prompt.key] = HintedSample(prompt.key, ids, said, (0.0,) * len(ids), reason, 3, 2, 1)
        return run
