"""Expert data -> data that the model could have written itself (arXiv 2602.12222): for SFT or IDFT.

    for item in realign(iter_lines("gsm8k.jsonl"), Realigner(decoder, reward, RealignOptions()), done=sources_already_written):
        write(item.record) if item.kind != "rejected" else count(item.reason)

For each sample, in this order:
    own        the model answers without help; an answer that the reward verifies is kept as it is
    analysis   else the model is shown the expert's answer and asked for an analysis, up to a last line "# CoT"
    hinted     question and answer and analysis (p) and the question alone (q) answer together, by hinted decoding; kept when verified
Everything else is rejected, with the reason.  Records are lines of the 'messages' form that megatron_plugin.data reads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from megatron_plugin.data import Conversation, ConversationEncoder, DataError, Message, parse_line
from megatron_plugin.rollout.engine import Completion, EngineLostError, SamplingParams
from megatron_plugin.rollout.fleet import Fleet, Request
from megatron_plugin.rollout.hinted.decode import HintedDecoder, HintedPrompt, HintedSample
from megatron_plugin.rollout.hinted.stops import EndReason
from megatron_plugin.rollout.rewards import Reward, RewardError, RewardSample

__all__ = ["ANALYSIS_PROMPT", "MARKER", "RealignOptions", "Realigned", "Realigner", "realign", "with_answer"]

MARKER = "# CoT"
CUT = "\ufffd"  # what a character becomes of which not all bytes were drawn
UNANSWERED = "no reference"  # a reward's cause
ANALYSIS_PROMPT = (
    "You are given a question and its reference answer. First analyse, in a few sentences, how the reference answer is reached and what a "
    f"solver who has not seen it must find out. Then write a line that says exactly '{MARKER}', and after it solve the question step by step in "
    "your own words, as if you had never seen the reference answer. End with the final answer in the form the question asks for."
)
"""The system turn of the hinted stream.  Ours: the authors' wording is not reproduced here."""


def with_answer(question: str, answer: str) -> str:
    """The user turn of the hinted stream."""
    return f"Question:\n{question}\n\nReference answer:\n{answer}"


@dataclass(frozen=True, kw_only=True)
class RealignOptions:
    """Beside those of the decoder (HintedOptions)."""

    unaided: SamplingParams | None = field(default_factory=lambda: SamplingParams(max_tokens=2048, temperature=0.0))
    """How the model answers on its own; with n above 1 the first verified answer is kept.  None: everything is hinted."""
    analysis_max_tokens: int = 16384
    """Of the greedy analysis, as the authors have it; cut to what the context leaves."""
    analysis_prompt: str = ANALYSIS_PROMPT
    marker: str = MARKER
    threshold: float = 1.0
    """An answer is verified when its reward is at least that."""
    batch: int = 256
    """Samples asked at a time: results come, and can be written, after each."""

    def __post_init__(self):
        if self.batch < 1 or self.analysis_max_tokens < 1 or not self.marker:
            raise ValueError(
                f"got batch={self.batch}, analysis_max_tokens={self.analysis_max_tokens}, marker={self.marker!r}; expected at least 1, 1, text"
            )


@dataclass(frozen=True)
class Realigned:
    """What became of one sample."""

    source: str
    """file:line of the expert's."""
    kind: str
    """own, hinted, rejected."""
    record: Mapping[str, Any] | None = None
    """A line for jsonl: messages (the expert's with the last answer replaced), source, kind, end_reason, tokens.  None: rejected."""
    reason: str = ""
    """Of a rejection: a cause of few words, then ": " and what there is to say."""
    end_reason: str = ""
    """Of the hinted answer, kept or not; "" where there was none."""


@dataclass
class Realigner:
    """What one realignment works with.  `counts` grows: own, hinted, rejected, and "rejected: <cause>"."""

    decoder: HintedDecoder
    reward: Reward
    options: RealignOptions = field(default_factory=RealignOptions)
    counts: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    """Counts of hinted decoding, all runs together (HintedRun.counts)."""
    tokens: int = 0
    """Drawn in all three stages, kept or not; those of a pair once."""

    def __post_init__(self):
        self.encoder = ConversationEncoder(self.decoder.tokenizer)
        self.fleet = Fleet([self.decoder.engine], timeout_s=self.decoder.timeout_s, concurrency=self.decoder.limits.max_num_seqs)

    def batch(self, conversations: Sequence[Conversation | DataError]) -> list[Realigned]:
        """One result for each, in order.  EngineLostError when the engine is gone; nothing of the batch is done then."""
        work, results = self._sort_out(conversations)
        self._reject_unanswered(work)
        if self.options.unaided is not None:
            self._answer_alone([item for item in work if item.result is None])
        self._analyse([item for item in work if item.result is None])
        self._answer_with_hint([item for item in work if item.result is None])
        results |= {item.position: item.result for item in work}
        for result in results.values():
            self.counts[result.kind] += 1
            if result.kind == "rejected":
                self.counts[f"rejected: {result.reason.partition(':')[0]}"] += 1
        return [results[i] for i in range(len(conversations))]

    # -- stages -----------------------------------------------------------------------------------------------------------------------------------

    def _sort_out(self, conversations: Sequence[Conversation | DataError]) -> tuple[list[_Work], dict[int, Realigned]]:
        work, results = [], {}
        seen: Counter[str] = Counter()
        for position, conversation in enumerate(conversations):
            source = conversation.source or ""
            try:
                if isinstance(conversation, DataError):
                    raise conversation
                seen[source] += 1
                key = source if seen[source] == 1 else f"{source} ({seen[source]})"
                work.append(_Work(key, position, conversation, self.encoder.prompt(conversation)))
            except DataError as error:
                results[position] = Realigned(source, "rejected", reason=f"bad sample: {error}")
        return work, results

    def _reject_unanswered(self, work: Sequence[_Work]) -> None:
        """Those whose expert's answer has nothing to verify an answer by: no number behind "####", say.

        A reward raises RewardError when it finds no reference in any sample it has seen, which at the end of a file may be a handful."""
        before = Counter(self.reward.counts)
        samples = [RewardSample(item.question, item.expert.content, item.expert.content) for item in work]
        try:
            causes = [result.cause for result in self.reward(samples)] if samples else []
        except RewardError:
            if any(not name.endswith(UNANSWERED) for name in Counter(self.reward.counts) - before):
                raise  # the judge is at fault, not the data
            causes = [UNANSWERED] * len(work)
        for item, cause in zip(work, causes, strict=True):
            if cause == UNANSWERED:
                item.reject(f"no answer: the reward '{self.reward.name}' finds nothing to verify by in the expert's {item.expert.content[-80:]!r}")

    def _answer_alone(self, work: Sequence[_Work]) -> None:
        """The first verified answer of each becomes its result."""
        answers = self._ask({item.position: item.plain_ids for item in work}, self.options.unaided)
        whole = [(item, c) for item in work for c in answers.get(item.position, ()) if c.finish_reason == "stop"]
        for (item, completion), fine in zip(whole, self._verify([(item, self._text(c.token_ids)) for item, c in whole]), strict=True):
            if fine is None and item.result is None:
                own = self._keep(item, "own", completion.token_ids, EndReason.EOS)
                item.result = own if own.record is not None else None

    def _analyse(self, work: Sequence[_Work]) -> None:
        """Each one's hinted prompt: what it was shown, and its own analysis up to the last marker."""
        room = self.decoder.engine.max_model_len
        asked = {}
        for item in work:
            try:
                shown = self._shown(item.conversation)
            except DataError as error:  # such as a chat template without a system turn
                item.reject(f"hint refused: {error}")
                continue
            if len(shown) + 1 >= room:
                item.reject(f"hint too long: the hinted prompt has {len(shown)} tokens, the context holds {room}")
            else:
                item.hinted_ids, asked[item.position] = shown, shown
        greedy = SamplingParams(max_tokens=self.options.analysis_max_tokens, temperature=0.0)
        answers = self._ask(asked, greedy)
        for item in work:
            if item.position not in asked:
                continue
            if item.position not in answers:
                item.reject(f"refused: {self._refused[item.position]}")
                continue
            analysis = self._text(answers[item.position][0].token_ids)
            cut = analysis.rfind(self.options.marker)
            if cut < 0:
                item.reject(f"no analysis: the model wrote {len(analysis)} characters without a line {self.options.marker!r}")
            else:
                hint = analysis[: cut + len(self.options.marker)] + "\n"
                item.hinted_ids = [*item.hinted_ids, *self.decoder.tokenizer.encode(hint, add_special_tokens=False)]

    def _answer_with_hint(self, work: Sequence[_Work]) -> None:
        waiting = [item for item in work if item.result is None]
        run = self.decoder.run([HintedPrompt(item.key, item.plain_ids, item.hinted_ids) for item in waiting])
        self.pairs.update(run.counts)
        self.tokens += sum(len(sample.token_ids) for sample in run.samples.values())
        for item in waiting:
            if item.key in run.rejected:
                item.reject(f"not decoded: {run.rejected[item.key]}")
        drawn = [(item, run.samples[item.key]) for item in waiting if item.result is None]
        for (item, sample), cause in zip(drawn, self._verify([(item, sample.text) for item, sample in drawn]), strict=True):
            self._settle(item, sample, cause)

    def _settle(self, item: _Work, sample: HintedSample, cause: str | None) -> None:
        end = sample.end_reason
        if end is not EndReason.EOS:
            item.reject(f"unfinished: hinted decoding ended by {end.value} after {len(sample.token_ids)} tokens")
        elif cause is not None:
            item.reject(f"not verified: {cause}")
        else:
            extra = {"split_at": sample.split_at, "attempts": sample.attempts}
            item.result = self._keep(item, "hinted", sample.token_ids, end, extra)
        item.result = replace(item.result, end_reason=end.value)

    # -- helpers ----------------------------------------------------------------------------------------------------------------------------------

    def _ask(self, prompts: Mapping[int, Sequence[int]], params: SamplingParams) -> dict[int, list[Completion]]:
        """Of prompts that were answered; causes of the others are in self._refused."""
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *self.decoder.options.end_ids))
        generated = self.fleet.generate(Request(position, ids, params) for position, ids in prompts.items())
        if generated.missing:
            raise EngineLostError(next(iter(generated.missing.values())))
        self._refused = generated.refused
        self.tokens += generated.tokens
        return generated.completions

    def _verify(self, answers: Sequence[tuple[_Work, str]]) -> list[str | None]:
        """None for a verified answer, else why it is not."""
        samples = [RewardSample(item.question, text, item.expert.content) for item, text in answers]
        results = self.reward(samples) if samples else []
        return [None if r.reward >= self.options.threshold else f"{r.cause} (reward {r.reward:g})" for r in results]

    def _keep(self, item: _Work, kind: str, token_ids: Sequence[int], end: EndReason, extra: Mapping[str, Any] | None = None) -> Realigned:
        source = item.conversation.source
        answer = self._text(token_ids)
        if CUT in answer:
            return Realigned(source, "rejected", reason=f"cannot be trained on: the answer holds a character that was cut off (U+FFFD) in {answer[-80:]!r}")
        messages = [*(_turn(m) for m in item.before), _turn(replace(item.expert, content=answer))]
        try:  # as the trainer will read it: an answer without text, or with a role's mark written out, cannot be trained on
            self.encoder.encode(parse_line(json.dumps({"messages": messages}), source, train_on="last"))
        except DataError as error:
            return Realigned(source, "rejected", reason=f"cannot be trained on: {error}")
        record = {"messages": messages, "source": source, "kind": kind, "end_reason": end.value, "tokens": len(token_ids), **(extra or {})}
        return Realigned(item.conversation.source, kind, record)

    def _shown(self, conversation: Conversation) -> list[int]:
        """The hinted prompt: the conversation up to the question, with the analysis asked for in the system turn and the expert's answer in the question's."""
        item = _Work("", 0, conversation, [])
        system = "\n\n".join([self.options.analysis_prompt, *(m.content for m in item.before if m.role == "system")])
        earlier = (m for m in item.before[:-1] if m.role != "system")
        asked = Message("user", with_answer(item.question, item.expert.content))
        turns = (Message("system", system), *earlier, asked, Message("assistant", "-", train=True))
        return self.encoder.prompt(Conversation(turns, conversation.source))

    def _text(self, token_ids: Sequence[int]) -> str:
        return self.decoder.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _turn(message: Message) -> dict[str, Any]:
    """As data files have it; a weight other than 1, such as the 0 of a turn that is not to be trained, goes with it."""
    turn = {"role": message.role, "content": message.content}
    return turn | {"weight": message.weight} if message.role == "assistant" and message.weight != 1 else turn


@dataclass(eq=False)
class _Work:
    """A sample on its way."""

    key: str
    """Its source, which its seed comes from: not its place in a batch."""
    position: int
    conversation: Conversation
    plain_ids: list[int]
    hinted_ids: list[int] = field(default_factory=list)
    result: Realigned | None = None

    @property
    def expert(self) -> Message:
        """The answer: the last turn that is trained."""
        return [message for message in self.conversation.messages if message.train][-1]

    @property
    def before(self) -> Sequence[Message]:
        messages = self.conversation.messages
        return messages[: max(i for i, message in enumerate(messages) if message.train)]

    @property
    def question(self) -> str:
        return self.before[-1].content

    def reject(self, reason: str) -> None:
        self.result = Realigned(self.conversation.source, "rejected", reason=reason)


def realign(conversations: Iterable[Conversation | DataError], realigner: Realigner, *, done: Container[str] = ()) -> Iterator[Realigned]:
    """One result per conversation, in order, batch by batch; those whose source is in `done` are passed over (a run that goes on)."""
    todo = (item for item in conversations if item.source not in done)
    while batch := list(islice(todo, realigner.options.batch)):
        yield from realigner.batch(batch)
