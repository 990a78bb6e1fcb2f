"""The embedded data: right answers, disjoint splits, the same text for the same seed, short enough."""

import re

import pytest

from megatron_plugin.data import SPLITS, extract_answer, generate, load_rows, read_conversations, train_tokenizer, write_arithmetic

COUNTS = {"warm": 600, "train": 600, "heldout": 150, "ood": 150, "expert": 300, "prompts": 300}
VERBS = {"finds": "+", "buys": "+", "gets": "+", "loses": "-", "sells": "-", "eats": "-", "times": "*"}


@pytest.fixture(scope="module")
def problems() -> dict[str, list[dict]]:
    return {split: generate(split, count, seed=0) for split, count in COUNTS.items()}


def read_question(question: str) -> tuple:
    """(first number, (operation, operand), ...) read from the words alone, without the generator's own problem."""
    first = int(re.search(r" has (\d+) ", question).group(1))
    return first, *((VERBS[verb], int(number)) for verb, number in re.findall(r"\b(\w+) (\d+)(?=[,.])", question))


def result(problem: tuple) -> int:
    value = problem[0]
    for operation, operand in problem[1:]:
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[operation]
    return value


@pytest.mark.parametrize("split", SPLITS)
def test_the_answers_are_right(problems, split):
    for line in problems[split]:
        problem = read_question(line["question"])
        *steps, last = line["answer"].split("\n")
        assert last == f"#### {result(problem)}" and extract_answer(line["answer"]) == str(result(problem)), line
        assert len(steps) == len(problem) - 1
        value = problem[0]
        for step, (operation, operand) in zip(steps, problem[1:], strict=True):
            value = result((value, (operation, operand)))
            assert step == f"{step.split(operation)[0]}{operation}{operand}={value}" and 1 <= value <= 20, line
            assert eval(step.split("=")[0]) == value


def test_the_splits_share_no_problem(problems):
    """In numbers, not only in words; and with any seeds: the hash decides."""
    keys = {split: {read_question(line["question"]) for line in lines} for split, lines in problems.items()}
    more = {read_question(line["question"]) for seed in (1, 2) for split in ("warm", "train") for line in generate(split, 500, seed)}
    seen = keys["warm"] | keys["train"] | more
    assert not keys["heldout"] & seen and not keys["ood"] & seen and not keys["heldout"] & keys["ood"]
    assert {len(key) - 1 for key in keys["train"]} == {1, 2} and {len(key) - 1 for key in keys["warm"]} == {1, 2, 3}
    assert {len(key) - 1 for key in keys["heldout"]} == {2} and {len(key) - 1 for key in keys["ood"]} == {3}


def test_demonstrations_and_prompts_share_no_problem(problems):
    keys = {split: {read_question(line["question"]) for line in problems[split]} for split in COUNTS}
    assert not keys["expert"] & keys["prompts"]
    for split in ("expert", "prompts"):
        assert not keys[split] & (keys["heldout"] | keys["ood"]) and {len(key) - 1 for key in keys[split]} == {2, 3}


def test_hasty_answers_stop_early_and_are_otherwise_right():
    lines = generate("warm", 400, 3, largest=10, hasty=0.5)
    hurried = 0
    for line in lines:
        problem, steps = read_question(line["question"]), line["answer"].split("\n")[:-1]
        assert extract_answer(line["answer"]) == str(result(problem[: len(steps) + 1])) and problem[0] <= 10
        hurried += len(steps) < len(problem) - 1
    several = sum(len(read_question(line["question"])) > 2 for line in lines)
    assert 0.4 < hurried / several < 0.6
    assert generate("train", 50, 4, hasty=0.0, largest=20) == generate("train", 50, 4)


def test_no_question_twice_and_enough_of_them(problems):
    for lines in problems.values():
        assert len({line["question"] for line in lines}) == len(lines)
    for split, count in SPLITS.items():
        assert len(generate(split, count, seed=5)) == count


def test_each_single_step_of_the_heldout_is_taught(problems):
    """Otherwise held-out accuracy would measure luck: nothing in the data says what an unseen fact is."""

    def facts(lines):
        return {step for line in lines for step in line["answer"].split("\n")[:-1]}

    assert facts(problems["heldout"]) | facts(problems["ood"]) <= facts(generate("train", SPLITS["train"], seed=0))


def test_the_seed_decides():
    assert generate("train", 50, seed=0) == generate("train", 50, seed=0) != generate("train", 50, seed=1)
    assert generate("train", 50, seed=0) == generate("train", 80, seed=0)[:50]


def test_the_text_is_the_one_of_all_versions():
    """Written down: results in benchmarks/ are only comparable while the data stays what it was."""
    assert generate("ood", 1, seed=0) == [
        {"question": "Eva has 2 books, gets 5, buys 3, gets 2. How many?", "answer": "2+5=7\n7+3=10\n10+2=12\n#### 12"}
    ]


def test_fillers_change_the_style_only():
    plain, styled = generate("train", 300, seed=0), generate("train", 300, seed=0, filler=0.5)
    assert [line["question"] for line in plain] == [line["question"] for line in styled]
    assert [re.sub(r"(?m)^(So|Now|Well|Then) ", "", line["answer"]) for line in styled] == [line["answer"] for line in plain]
    lines = [step for line in styled for step in line["answer"].split("\n")[:-1]]
    assert 0.4 < sum(step[0].isalpha() for step in lines) / len(lines) < 0.6


def test_the_files(tmp_path):
    """Written, read back through the public way, and at most 60 tokens each with a tokenizer trained on them."""
    paths = write_arithmetic(tmp_path, 0, counts=COUNTS, filler=0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{split}.jsonl" for split in COUNTS)
    conversations = read_conversations(paths["train"])
    tokenizer = train_tokenizer((m.content for c in conversations for m in c.messages), tmp_path / "tokenizer", vocab_size=512)
    for split, path in paths.items():
        report = load_rows(path, tokenizer, 60, packing=False).report
        assert report.samples == COUNTS[split] and report.loss_tokens < report.tokens / 1.5
    assert not re.search("So|Now|Well|Then", paths["heldout"].read_text() + paths["warm"].read_text())


@pytest.mark.parametrize(
    "text, answer",
    [
        ("12+7=19\n#### 19", "19"),
        ("#### 1,020", "1020"),
        ("####72", "72"),
        ("#### $5.50\n", "5.5"),
        ("#### -3", "-3"),
        ("####  $-4", None),
        ("#### 7.00", "7"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### -0", "0"),
        ("#### 1.", "1"),
        ("#### 19<|eos|>", "19"),
        ("#### 4 #### 5", "4"),
        ("#### x\n#### 6", "6"),
        ("the answer is 7", None),
        ("####", None),
        ("", None),
        ("### 4", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_wrong_arguments():
    with pytest.raises(ValueError, match="split: got 'test', expected one of warm, train, heldout, ood"):
        generate("test", 1, seed=0)
    for count in (0, 50_001):
        with pytest.raises(ValueError, match=f"count: got {count}, expected 1 to 50000"):
            generate("heldout", count, seed=0)
