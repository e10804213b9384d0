"""The laboratory of bench/studies/lab: its scorers, its statistics, and the whole way at a tiny size."""

import itertools
import json
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from bench.studies.lab import contestants, data, language, measure, model, study
from bench.studies.lab.contestants import Method
from bench.studies.lab.data import Condition
from bench.studies.lab.model import Origin
from bench.studies.lab.study import CONTESTANTS, Run
from mopo_kernels import MOPODual, mopo_weights

PROMPT = "tell mia bread lamp :"


def note(text):
    return [*language.encode(text), language.END]


def scored(*texts):
    asked = torch.tensor([language.encode(PROMPT)])
    return language.scores(asked, model.pad([note(text) for text in texts])[None])[0].tolist()


def test_scores_count_words():
    assert scored(
        "thank you mia . what a lovely bread .", "the lamp is late .", "the boat is new . bread comes today ."
    ) == [
        [2.0, -9.0, 1.0],
        [-1.0, -5.0, 1.0],
        [0.0, -9.0, 0.0],
    ]


def test_well_formed_notes_are_rows_of_sentences_that_end():
    assert language.well_formed(note("dear mia , the lamp is new ."))
    assert not language.well_formed(note("dear mia , the lamp is ."))
    assert not language.well_formed(note("dear mia"))
    assert not language.well_formed(language.encode("dear mia ,"))


def test_every_note_of_the_corpus_is_well_formed_and_fits():
    asked = language.prompts(0, 100, "train")
    for row in language.corpus(asked, seed=0, ornate=0.5):
        assert language.well_formed(row[language.PROMPT_LENGTH :])
        assert len(row) <= language.PROMPT_LENGTH + language.MAX_LENGTH


def test_parts_share_no_pair_of_things():
    parts = [{tuple(x) for x in language.prompts(0, 300, part)[:, 2:4].tolist()} for part in ("train", "tune", "test")]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_labels_are_the_share_of_the_group_that_is_beaten():
    values = torch.tensor([[[3.0], [1.0], [1.0]]])
    assert data.win_rates(values, accuracy=1.0, seed=0).flatten().tolist() == [1.0, 0.25, 0.25]
    assert data.win_rates(values, accuracy=0.0, seed=0).flatten().tolist() == [0.0, 0.75, 0.75]


def test_the_grid_of_words_changes_no_log_probability():
    torch.manual_seed(0)
    tiny = model.TinyLM()
    rows = language.corpus(language.prompts(0, 6, "train"), 0, 0.5)
    ids, target = model.next_tokens(model.pad(rows))
    together = model.log_probs(tiny, ids, target)
    alone = [model.log_probs(tiny, *model.next_tokens(model.pad([row]))) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone))


def test_sampled_notes_have_the_probabilities_of_the_model():
    """The cache and the rows that leave change nothing: the first two words appear as often as log_probs says."""
    torch.manual_seed(0)
    tiny = model.TinyLM()
    with torch.no_grad():
        tiny.norm.weight *= 6  # far from uniform
    asked = torch.tensor([language.encode(PROMPT)])
    notes = model.sample(tiny, asked, 1000, seed=1)[0]
    pairs, counts = notes[:, :2].unique(dim=0, return_counts=True)
    pair, share = pairs[counts.argmax()], counts.max() / 1000
    logp = model.log_probs(tiny, *model.sequences(asked, pair[None, None]))
    assert share == pytest.approx(float(logp.exp()), abs=4 * float(share / 1000) ** 0.5)


def test_rows_that_end_leave_the_others_as_they_were(monkeypatch):
    """At temperature 0 every note is the model's arg max word by word, whoever has ended before."""
    torch.manual_seed(0)
    tiny, asked = model.TinyLM(), language.prompts(0, 8, "train")
    with torch.no_grad():
        tiny.norm.weight *= 6
    ids = asked
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, (tiny(ids)[:, -1] @ tiny.head.T).argmax(-1, keepdim=True)], 1)
    greedy = ids[:, language.PROMPT_LENGTH :]
    monkeypatch.setattr(model, "END", int(greedy[0, 1]))
    notes = model.sample(tiny, asked, 1, seed=0, temperature=1e-6)[:, 0]
    ended = [row.index(model.END) if model.END in row else 5 for row in greedy.tolist()]
    assert len(set(ended)) > 1
    for note, expected, end in zip(notes, greedy, ended, strict=True):
        assert note[: end + 1].tolist() == expected[: end + 1].tolist()


def test_kl_of_the_base_to_itself_is_zero_and_it_wins_half():
    found = measure.measure(data.writer("base", Origin(2))[0], ["base"], "tune", seed=0, count=40, origin=Origin(2))
    assert found["kl"] == 0
    assert found["forgotten"] == 0
    for wins in found["half_wins_base"].values():
        assert np.mean(wins) / (2 * measure.SAMPLES * measure.OPPONENTS) == pytest.approx(0.5, abs=0.1)


def test_wins_count_ties_half():
    ours, theirs = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0], [0.0]]])
    assert measure.wins(ours, theirs).tolist() == [[0.875]]


def test_the_interval_sees_seeds_and_prompts():
    rng = np.random.default_rng(0)
    for one in (rng.normal(size=(5, 1)), rng.normal(size=(1, 400))):
        mean, low, high = measure.bootstrap(np.broadcast_to(one, (5, 400)))
        assert low < mean < high
        assert high - low == pytest.approx(3.92 * one.std() / one.size**0.5, rel=0.1)


def test_fresh_win_rate_by_enumeration():
    """Of n + 1 notes in random order one is fresh: each rank in the others' group is as likely."""
    for size in (2, 4, 8):
        fresh = np.random.default_rng(0).random((40_000, size + 1))
        group, other = fresh[:, :size], fresh[:, size:]
        v = (group[:, :1] > group[:, 1:]).mean(1)
        chosen = v == 1
        assert (group[chosen, :1] > other[chosen]).mean() == pytest.approx(data.fresh_win_rate(1.0, size), abs=0.01)
    assert data.asked_for(data.fresh_win_rate(0.7, 4), 4) == pytest.approx(0.7)


def test_equal_thresholds_are_interpolated_never_extrapolated():
    front = {0.4: 0.8, 0.6: 0.6, 0.7: 0.5}
    assert measure.at_equal_threshold(front, 0.5) == pytest.approx(0.7)
    assert measure.at_equal_threshold(front, 0.75) is None


def test_hand_set_weights_and_the_dual_reach_the_pair_losses():
    batch = data.labelled(Condition(groups=8), 0, Origin(2))
    multipliers = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    v = batch.win_rate.view(8, 2, 3)
    expected = sum(c * (2 * v[:, 0, k] - 1) for k, c in enumerate((1, 0.5, 0.25)))
    torch.testing.assert_close(contestants.margin(batch, multipliers), expected)
    log_ratio = torch.zeros(8, dtype=torch.float64)
    for step in contestants.PAIR_LOSSES:
        method = Method(step, 1e-3)
        assert contestants.PAIR_LOSSES[step](log_ratio, batch, method, multipliers).isfinite()


def test_all_pairs_of_a_group_are_ordered_as_their_scores():
    win_rate = data.win_rates(torch.tensor([[[3.0], [1.0], [1.0]], [[0.0], [2.0], [5.0]]]), accuracy=1.0, seed=0)
    nothing = torch.empty(0)
    batch = data.Labelled(nothing, nothing, win_rate, torch.tensor([0, 0, 0, 1, 1, 1]), nothing, nothing)
    i, j = contestants.pairs(batch.group)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    assert contestants.order(batch)[:, 0].tolist() == [1, 1, 0, -1, -1, -1]


def test_dpo_under_the_dual_is_best_where_mopos_target_is():
    """In groups of any size its loss is stationary at h = log(w / ref) / beta, ref being uniform in the group."""
    torch.manual_seed(0)
    win_rate = data.win_rates(torch.randn(3, 4, 3), accuracy=1.0, seed=0)
    group, nothing = torch.arange(3).repeat_interleave(4), torch.empty(0)
    batch = data.Labelled(nothing, nothing, win_rate, group, nothing, nothing)
    multipliers, method = torch.tensor([1.0, 0.6, 0.2], dtype=torch.float64), Method("dpo", 1e-3, tau=0.3)
    h = mopo_weights(win_rate, group, multipliers, tau=0.3).log() / method.beta
    i, j = contestants.pairs(group)
    log_ratio = (h[i] - h[j]).requires_grad_()
    contestants.dpo(log_ratio, batch, method, multipliers).backward()
    torch.testing.assert_close(log_ratio.grad, torch.zeros_like(log_ratio), rtol=0, atol=1e-12)


def test_a_wider_model_is_kept_beside_the_small_one(tmp_path):
    small, wide = (model.cached_model("base", Origin(2, width), tmp_path) for width in (64, 96))
    assert (small.embed.weight.shape[1], wide.embed.weight.shape[1]) == (64, 96)
    assert {path.name for path in tmp_path.iterdir()} == {"base-2.pt", "base-2-96x2.pt"}


def test_modpo_without_secondaries_is_dpo():
    batch = data.labelled(Condition(groups=8), 0, Origin(2))
    log_ratio, alone = torch.linspace(-3, 3, 8, dtype=torch.float64), torch.tensor([1.0, 0, 0], dtype=torch.float64)
    method = Method("dpo", 1e-3, scale="weights")
    torch.testing.assert_close(
        contestants.modpo(log_ratio, batch, method, alone), contestants.dpo(log_ratio, batch, method, alone)
    )


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(data, "MODELS", tmp_path_factory.getbasetemp() / "lab")


def test_a_measured_threshold_moves_by_what_is_missing(monkeypatch):
    """Asked 0.6 and found at 0.5 three times, the labels are asked 0.9 in the end."""
    asked = []
    monkeypatch.setattr(contestants, "brevity_of", lambda model, seed: 0.5)
    monkeypatch.setattr(MOPODual, "refresh", lambda dual, *labels: asked.append(round(float(dual.thresholds[0]), 3)))
    method = Method("contrast", 1e-3, aim=0.6, measured=True)
    base, _ = data.writer("base", Origin(2))
    contestants.train(base, data.labelled(Condition(groups=64), 0, Origin(2)), method, 8000, seed=0)
    assert asked == [0.6, 0.7, 0.8, 0.9]


def test_asked_again_is_on_the_line_between_two_trials():
    """Brevity 0.62 lies three fifths of the way from 0.5 to 0.7; where no trial reaches it, the nearest is asked."""
    screened = [Run("screen", "contrast", Method("contrast", 1e-3), condition) for condition in study.OF_SIZE.values()]
    level = {key: [32] for key in language.OBJECTIVES}
    rows = [asdict(run) | {"half_wins_base": level, "kl": 0.0} for run in screened]
    rows += [row | {"contestant": name} for name in ("clone", "regress") for row in rows]
    for name, highest in (("clone", 0.55), ("contrast", 0.7), ("regress", 0.7)):
        for size, condition in study.OF_SIZE.items():
            for aim, brevity in zip(study.ASKED_OF[size][::3], (0.5, highest), strict=True):
                tried = Run("asks", name, Method(name, 1e-3, aim=aim), condition)
                rows.append(asdict(tried) | {"tuning_brevity": brevity})
    runs = list(itertools.islice(study.again(rows), 9))  # of seed 0
    for run in runs:
        low, high = study.ASKED_OF[run.condition.size][::3]
        expected = high if run.method.step == "clone" else 0.4 * low + 0.6 * high
        assert run.method.aim == pytest.approx(expected, abs=1e-4)
    assert {run.condition.size for run in runs} == {2, 4, 8}


def test_the_whole_way_at_a_tiny_size(tmp_path):
    path = tmp_path / "runs.jsonl"
    small = {"condition": Condition(groups=64), "budget": 900, "held_out": 6, "pretraining": 2}
    names = [
        "clone, sgd dual",
        "clone, shrunk labels",
        "contrast + 1 clone",
        "regress per token",
        "MODPO",
        "rewarded soup",
    ]
    runs = [Run("smoke", name, Method(lr=1e-3, aim=0.6, **CONTESTANTS[name]), **small) for name in names]
    runs.append(replace(runs[0], condition=Condition("other", 4, 64, 0.7)))
    study.execute(runs, path, until=time.time() + 600)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["contestant"] for row in rows] == [run.contestant for run in runs]
    assert all(row["tokens"] >= 900 and row["steps"] > 0 for row in rows)
    study.execute(runs, path, until=time.time() + 600)
    assert len(path.read_text().splitlines()) == len(rows), "what is known is not run again"
