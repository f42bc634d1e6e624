"""The starter world: reproducible, answerable by its own grammar, and with nothing shared between train and
held-out."""

import re

import pytest

from envs.starter import KINDS, StarterWorld
from envs.starter_arithmetic import CLAUSES, UNSEEN_PAIRS, read_problem
from envs.starter_two_hop import COMBINATIONS, UNSEEN_COMBINATIONS, read_page, read_two_hop


@pytest.fixture(scope="module")
def world():
    return StarterWorld(seed=3)


@pytest.fixture(scope="module")
def train(world):
    return world.train_tasks(3000, seed=5)


@pytest.fixture(scope="module")
def test(world):
    return world.test_tasks(150)


def _combinations(task) -> set:
    if task.kind.startswith("two_hop"):
        return {tuple(task.metadata["relations"])}
    sentences = read_problem(task.question).sentences[1:]
    kinds = [next(i for i, c in enumerate(CLAUSES) if _fits(c.template, sentence)) for sentence in sentences]
    return set(zip(kinds, kinds[1:], strict=False))


def _fits(template: str, sentence: str) -> bool:
    from envs.starter_arithmetic import _pattern

    return _pattern(template).fullmatch(sentence) is not None


def test_same_seed_gives_the_same_world_and_another_seed_another(world, train):
    again = StarterWorld(seed=3)
    assert again.passages() == world.passages()
    assert again.train_tasks(50, seed=5) == train[:50]
    assert StarterWorld(seed=4).passages() != world.passages()
    assert again.train_tasks(50, seed=6) != train[:50]


def test_no_question_is_shared_and_all_are_distinct(train, test):
    questions = [task.question for task in train + test]
    assert len(set(questions)) == len(questions)
    assert len({task.id for task in train + test}) == len(questions)


def test_no_number_tuple_is_shared(train, test):
    def numbers(tasks):
        return {tuple(task.metadata["numbers"]) for task in tasks if "numbers" in task.metadata}

    assert numbers(train) and numbers(test)
    assert not numbers(train) & numbers(test)


def test_no_entity_pair_is_shared(train, test):
    def pairs(tasks):
        return {tuple(task.metadata["entities"]) for task in tasks if "entities" in task.metadata}

    assert pairs(train) and pairs(test)
    assert not pairs(train) & pairs(test)


def test_unseen_combinations_never_stand_in_training_and_seen_ones_do(train, test):
    trained = set().union(*(_combinations(task) for task in train))
    unseen_relations = {(a.name, b.name) for i, (a, b) in enumerate(COMBINATIONS) if i in UNSEEN_COMBINATIONS}
    assert not trained & (UNSEEN_PAIRS | unseen_relations)
    for task in test:
        has_unseen = bool(_combinations(task) & (UNSEEN_PAIRS | unseen_relations))
        assert has_unseen == task.kind.endswith("_unseen"), task


def test_every_question_can_be_answered_from_its_text_and_the_pages(world, train, test):
    entities = world.encyclopedia.entities
    for task in train + test:
        if task.kind.startswith("arithmetic"):
            assert str(read_problem(task.question).amounts[-1]) == task.answer
        else:
            hops = read_two_hop(task.question)
            bridge = read_page(entities[hops.entity].text)[hops.first.name]
            assert read_page(entities[bridge].text)[hops.second.name] == task.answer


def test_answers_cannot_be_guessed(test):
    answers = [task.answer for task in test if task.kind.startswith("arithmetic")]
    assert max(answers.count(answer) for answer in answers) <= 0.02 * len(answers)
    copied = [task for task in test if task.answer in re.findall(r"\w+", task.question)]
    assert len(copied) <= 0.01 * len(test)


def test_held_out_set_has_every_kind(test):
    assert {kind: sum(task.kind == kind for task in test) for kind in KINDS} == dict.fromkeys(KINDS, 150)


def test_share_must_be_a_share(world):
    with pytest.raises(ValueError, match=r"arithmetic_share must be in \[0, 1\], not 1.5"):
        world.train_tasks(1, arithmetic_share=1.5)
