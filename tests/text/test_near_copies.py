"""Near copies: the definition, exactness, and that none crosses from training into test, in any task or stream."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sae_research.config.evaluation_params import SparseProbing, SparseProbingSaeProbes
from sae_research.config.params import Text
from sae_research.evals.sae_probes.tasks import ProbeTask, load_probe_task, read_rows, task_names
from sae_research.runtime.errors import UserError
from sae_research.text import corpus, tasks
from sae_research.text.corpus import documents, text_fingerprint
from sae_research.text.crossed_tasks import CELLS, CROSSED_TASKS, _Parts, _select, load_crossed_tasks
from sae_research.text.packaged import PACKAGED_TASKS
from sae_research.text.split import SPLITS, NearIndex, groups, out_of_place, shingle_sets, shingles, split_of
from sae_research.text.tasks import TaskUnavailable, Texts, load_task
from sae_research.text.tokens import token_contexts
from tests.helpers.damage import DAMAGES

WORDS = [f"word{number}" for number in range(2_000)]


def words(*numbers: int) -> str:
    return " ".join(WORDS[number] for number in numbers)


def by_definition(text: str) -> set[tuple[str, ...]]:
    found = text.lower().split()[:120]
    return {tuple(found[i : i + 5]) for i in range(max(1, len(found) - 4))} if found else set()


def near_by_definition(texts: Sequence[str], others: Sequence[str]) -> set[tuple[int, int]]:
    """(text, other) of all near copies, from sets of words."""
    sets, holding = [by_definition(other) for other in others], defaultdict(list)
    for number, shingled in enumerate(sets):
        for shingle in shingled:
            holding[shingle].append(number)
    found = set()
    for number, text in enumerate(texts):
        mine = by_definition(text)
        common = Counter(other for shingle in mine for other in holding[shingle])
        found |= {(number, other) for other, n in common.items() if n / len(mine | sets[other]) >= 0.5}
    return found


def flat(part: Texts) -> list[str]:
    return [text for texts in part.values() for text in texts]


def crossing(train: Iterable[str], test: Iterable[str]) -> int:
    """Test texts with a near copy in train."""
    return len({number for number, _ in near_by_definition(list(test), list(train))})


# --- the definition --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        (words(*range(12)), words(*range(12)).upper().replace(" ", "\n\t"), True),  # neither case nor spacing counts
        (words(*range(16)), words(*range(12), 20, 21, 22, 23), True),  # 8 of 16 shingles
        (words(*range(16)), words(*range(12), 20, 21, 22, 23, 24), False),  # 8 of 17
        (words(*range(120)), words(*range(120), *range(500, 900)), True),  # what comes after 120 words does not count
        (words(*range(119)), words(*range(60), *range(500, 559)), False),
        ("a b c", "A  b C", True),
        ("a b c", "a b d", False),
        ("a b c d", "a b c d e", False),
        (" ", " ", False),
        ("", "a", False),  # a text without words is near nothing
    ],
)
def test_definition(one: str, other: str, near: bool) -> None:
    for texts, others in ([one], [other]), ([other], [one]):
        assert NearIndex(shingle_sets(others)).near(texts).tolist() == [near]
        assert bool(near_by_definition(texts, others)) == near


def test_shingles_are_the_same_in_every_process() -> None:
    """They are kept in a cache."""
    assert shingles("The quick brown fox jumps over").tolist() == [2247479744533809214, 8189267298377266199]
    assert shingles("one").tolist() == [14489617718373642804]


def test_every_near_copy_is_found_and_nothing_else() -> None:
    rows = read_rows("42_temp_sense")["prompt"].tolist()[:600]
    rng = random.Random(0)
    rows += [words(*(rng.randrange(7) for _ in range(rng.randrange(20)))) for _ in range(300)]  # few words, many ties
    found = {
        (int(a), int(b))
        for portion in NearIndex(shingle_sets(rows)).pairs(shingle_sets(rows))
        for a, b in zip(*portion, strict=True)
    }
    assert found == near_by_definition(rows, rows) and len(found) > len(rows) + 100


def test_portions_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    rows = [words(*(rng.randrange(3) for _ in range(9))) for _ in range(150)]
    rows += [words(*range(start, start + 20)) for start in range(0, 600, 4)]  # one chain
    whole = groups(rows)
    monkeypatch.setattr("sae_research.text.split._CANDIDATES", 50)
    monkeypatch.setattr("sae_research.text.split._VERIFIED", 10)
    parted = groups(rows)
    assert len(set(zip(whole, parted, strict=True))) == len(set(whole)) == len(set(parted)) < 150


def test_groups_are_chains_whatever_the_order() -> None:
    chain = [words(*range(start, start + 20)) for start in range(0, 40, 5)]
    texts = [*chain, *(words(*range(start, start + 20)) for start in range(500, 900, 40)), "short", ""]
    splits = [SPLITS[2 + number % 2] for number in range(len(texts))]
    want = {text: wrong for text, wrong in zip(texts, out_of_place(texts, splits), strict=True)}
    assert not near_by_definition(chain[:1], chain[-1:]) and len(set(groups(texts)[: len(chain)])) == 1
    assert sum(want.values()) == 4, "half of the chain, none of the others"
    for seed in range(5):
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        again = out_of_place([texts[i] for i in order], [splits[i] for i in order])
        assert {texts[i]: wrong for i, wrong in zip(order, again, strict=True)} == want
    assert out_of_place([], []).tolist() == []


# --- tasks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "train_size", "test_size"),
    [*((name, 360, 60) for name in SparseProbing().dataset_names if name != "code_language"), ("code_language", 480, 300)],
)
def test_no_test_text_has_a_near_copy_in_train(name: str, train_size: int, test_size: int) -> None:
    task = load_task(name, train_size, test_size, seed=0)
    assert crossing(flat(task.train), flat(task.test)) == 0
    assert name != "code_language" or 100 < task.notes["near_copies_dropped"] < 300, "of 2,393; a fifth of test had one"


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGED_TASKS)
def test_none_in_any_packaged_task(name: str) -> None:
    pool = tasks.apart(tasks.distinct_texts(tasks._packaged_rows(PACKAGED_TASKS[name])))
    assert crossing(flat(pool.train), flat(pool.test)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CROSSED_TASKS)
def test_none_in_tasks_with_two_attributes_as_they_are_cut(name: str) -> None:
    (task,) = load_crossed_tasks(name, 160, 120, 42, lambda *_: pytest.fail("left out"))
    assert crossing(*([text for texts in part.values() for text in texts] for part in (task.train, task.test))) == 0


def lab_texts(task: ProbeTask) -> tuple[list[str], list[str]]:
    train, test = ([task.texts[i] for i in part] for part in (task.lab.train, task.lab.test))
    return train, test


def test_the_lab_split_of_sae_probes_has_none() -> None:
    task = load_probe_task("42_temp_sense", SparseProbingSaeProbes(), 0)
    assert crossing(*lab_texts(task)) == 0 and task.notes["near_copies_dropped"] > 50
    assert len(task.lab.test) >= 100, "two of three test texts had one"


@pytest.mark.slow
def test_the_lab_split_has_none_in_any_task() -> None:
    for name in task_names():
        try:
            assert crossing(*lab_texts(load_probe_task(name, SparseProbingSaeProbes(), 0))) == 0, name
        except TaskUnavailable as error:
            assert "near cop" not in str(error)


def local_rows() -> list[dict[str, str]]:
    """Every text twice, the second time with another end; two attributes."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=30)) for _ in range(400)]
    return [
        {"text": text + end, "label": f"class {number % 2}", "second_label": f"kind {number // 2 % 2}"}
        for number, text in enumerate(texts)
        for end in ("", " the end")
    ]


@pytest.mark.parametrize("backwards", [False, True])
def test_local_tables(tmp_path: Path, backwards: bool) -> None:
    rows = local_rows()
    for name, content in ("there", rows), ("back", rows[::-1]):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    path = str(tmp_path / f"{'back' if backwards else 'there'}.jsonl")
    task = load_task(path, 120, 60, seed=1)
    assert crossing(flat(task.train), flat(task.test)) == 0 and task.notes["near_copies_dropped"] > 15
    assert task.train == load_task(str(tmp_path / "there.jsonl"), 120, 60, seed=1).train
    assert {split_of(text) for text in flat(task.train)} == {"probe_train"}, "texts are left out, never moved"
    (crossed,) = load_crossed_tasks(path, 60, 32, 1, lambda *_: pytest.fail("left out"))
    assert crossing(*([text for texts in part.values() for text in texts] for part in (crossed.train, crossed.test))) == 0


def test_a_table_of_one_template_says_why_it_is_no_task(tmp_path: Path) -> None:
    rows = [{"text": f"{words(*range(20))} {number}", "label": "ab"[number % 2]} for number in range(200)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskUnavailable, match=r"\(\d+ near copies of texts of the other part left out\)"):
        load_task(str(tmp_path / "mine.jsonl"), 8, 8, seed=1)


def test_sae_bench_tasks_lose_test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"a": [words(*range(20))], "b": [words(*range(100, 120))]}
    test = {
        "a": [words(*range(20)).upper(), words(*range(1, 21)), words(*range(40, 60))],
        "b": [words(*range(200, 220)), words(*range(99, 119))],
    }
    monkeypatch.setattr(tasks, "_sae_bench_texts", lambda *_: (train, test))
    task = load_task("fancyzhx/ag_news", 2, 2, seed=0)
    assert task.train == train and task.test == {"a": test["a"][2:], "b": test["b"][:1]}
    assert task.notes["test_copies_of_train_dropped"] == 1 and task.notes["test_near_copies_of_train_dropped"] == 2


def test_sae_bench_tasks_with_two_attributes_pass_over_them() -> None:
    numbers = iter(range(0, 2_000, 20))
    texts = {
        part: {cell: [words(*range(n, n + 20)) for n, _ in zip(numbers, range(6), strict=False)] for cell in CELLS}
        for part in ("train", "test")
    }
    near = {cell: [f"{text} end" for text in found[:2]] for cell, found in texts["train"].items()}
    parts = _Parts(
        "hub",
        ("a", "b"),
        ("c", "d"),
        texts["train"],
        {cell: [*near[cell], *found] for cell, found in texts["test"].items()},
        {},
        seed_picks=False,
    )
    task = _select(parts, 8, 8, 0)
    assert task.test == {cell: found[: len(task.train[cell])] for cell, found in texts["test"].items()}
    with pytest.raises(TaskUnavailable, match="are no near copies of its train texts"):
        _select(parts._replace(test={cell: 4 * found for cell, found in near.items()}), 8, 8, 0)


# --- streams ---------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Text:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.jsonl").write_text("\n".join(map(json.dumps, local_rows())))
    return Text(dataset=str(tmp_path / "mine"), context_size=16)


def test_training_text_is_no_near_copy_of_held_out_text(text: Text, tmp_path: Path) -> None:
    found = documents(text, "sae_train")
    train, core = ([document.text for document in part] for part in (found, documents(text, "core_eval")))
    own = {row["text"] for row in local_rows() if split_of(row["text"]) == "sae_train"}
    gone = sorted(own - set(train))
    assert set(train) <= own and found.near_copies == len(gone) > 20
    assert crossing(core, train) == 0 and crossing(core, gone) == len(gone), "and no other text is left out"
    rows = (tmp_path / "mine" / "rows.jsonl").read_text().splitlines()
    (tmp_path / "mine" / "rows.jsonl").write_text("\n".join(reversed(rows)))
    assert [document.text for document in documents(text, "sae_train")] == train[::-1]


def test_the_index_is_kept_checked_and_made_again(text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], corpus.Documents._first

    def noted(self: corpus.Documents) -> Iterator[corpus.Document]:
        read.append(1)
        yield from real(self)

    monkeypatch.setattr(corpus.Documents, "_first", noted)
    want = list(documents(text, "sae_train"))
    assert list(documents(text, "sae_train")) == want and len(read) == 1
    (entry,) = (tmp_path / ".cache/held_out").iterdir()
    for times, hurt in enumerate(DAMAGES.values(), 2):
        hurt(entry / "codes.npy")
        assert list(documents(text, "sae_train")) == want and len(read) == times
    shorter = text.model_copy(update={"held_out_characters": 1_000})
    assert len(list(documents(shorter, "sae_train"))) > len(want)
    assert text_fingerprint(shorter, "sae_train") != text_fingerprint(text, "sae_train")


def test_text_of_token_ids_is_not_kept(byte_tokenizer: PreTrainedTokenizerFast, text: Text, tmp_path: Path) -> None:
    """Another tokenizer makes another text of it."""
    want = token_contexts(byte_tokenizer, 256, text, "sae_train", 2_000).tokens
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "rows.jsonl").write_text(
        "\n".join(
            json.dumps({"text": byte_tokenizer(row["text"], add_special_tokens=False)["input_ids"]}) for row in local_rows()
        )
    )
    tokenised = text.model_copy(update={"dataset": str(tmp_path / "ids")})
    assert (token_contexts(byte_tokenizer, 256, tokenised, "sae_train", 2_000).tokens == want).all()
    assert len(list((tmp_path / ".cache/held_out").iterdir())) == 1


def test_too_little_text_says_what_was_left_out(byte_tokenizer: PreTrainedTokenizerFast, text: Text) -> None:
    with pytest.raises(UserError, match=r"documents, \d+ others are near copies of held-out text\)"):
        token_contexts(byte_tokenizer, 256, text, "sae_train", 1_000_000)
    short = text.model_copy(update={"held_out_characters": 8_000})
    with pytest.raises(UserError, match=r"documents, text.held_out_characters is 8,000\)"):
        token_contexts(byte_tokenizer, 256, short, "core_eval", 1_000_000)
    assert 8_000 <= sum(len(document.text) for document in documents(short, "core_eval")) < 8_300


def test_the_index_holds_any_number_of_texts() -> None:
    assert NearIndex(shingle_sets([])).near(["a b c"]).tolist() == [False]
    assert NearIndex(shingle_sets(["", ""])).near(["", "a"]).tolist() == [False, False]
    assert NearIndex(shingle_sets(["a", "b", "a"])).near(["A", "c"]).tolist() == [True, False]
    assert np.array_equal(groups(["x y", "", "X Y", ""]), groups(["x y", "", "X Y", ""]))
