"""The mean over documents is the metric: of results.json, of scikit-learn, or by hand."""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from mmalign.errors import UserError
from mmalign.evaluation.beside import compare_beside, correlation, gain_and_style, summarize_beside
from mmalign.evaluation.document_scores import MEANS, document_scores
from mmalign.evaluation.scoring import Score
from mmalign.evaluation.tasks import MEANS as TASK_MEANS
from mmalign.evaluation.tasks import TASKS, describe_data, load_documents, summarize
from mmalign.evaluation.tasks.multiple_choice import MultipleChoice
from mmalign.evaluation.tasks.truthfulqa import ANSWER_ONLY, CATEGORIES


def make_items(root: Path, seed: int, limit: int | None = None, shift: float = 0.0) -> dict:
    """Items of a model that draws its log-likelihoods, a little better than chance."""
    rng = np.random.default_rng(seed)
    items = {}
    names = [name for name, task in TASKS.items() if isinstance(task, MultipleChoice)]
    for name, documents in load_documents(names, root, limit).items():
        scores = []
        for document in documents:
            gold = document.gold if isinstance(document.gold, tuple) else ()
            right = set(np.flatnonzero(gold)) or {document.gold}
            row = [
                Score(float(rng.normal(-20 + (i in right), 4.0)) + shift * i, 1 + len(text) // 4, 0)
                for i, (_, text) in enumerate(document.requests)
            ]
            alone = [Score(float(rng.normal(-25, 4.0)), 1, 0) for _ in document.answers_only]
            scores.append([*row, *alone])
        items[name] = TASKS[name].make_items(documents, scores)
    return items


@pytest.fixture(scope="module")
def root(shared_data) -> Path:
    return shared_data


@pytest.fixture(scope="module")
def items(root) -> dict:
    return make_items(root, seed=0)


@pytest.fixture(scope="module")
def scores(items, root):
    return document_scores(items, make_items(root, seed=1))


def choices_of(item: dict, key: str = "loglikelihood") -> np.ndarray:
    return np.array([choice[key] for choice in item["choices"]])


def test_tasks_metrics_are_those_of_results_json(items, scores):
    results = summarize(items)
    for name in items:
        assert scores[name].values.mean() == pytest.approx(results[name]["acc"])
        assert len(scores[name].values) == results[name]["n"]
        if "yes_rate" in results[name]:
            rate = scores[f"{name}_yes_rate"].values.mean()
            assert rate == pytest.approx(results[name]["yes_rate"])
        if "em" in results[name]:
            assert scores[f"{name}_em"].values.mean() == pytest.approx(results[name]["em"])
    for name in TASK_MEANS:
        found = np.mean([scores[metric].values.mean() for metric in MEANS[name]])
        assert found == pytest.approx(results[name]["acc"])


def test_arrays_belong_together(items, scores):
    for name, found in scores.items():
        assert found.metric == name and found.task in items
        assert len(found.doc_ids) == len(found.clusters) == len(found.values)
        assert (found.doc_ids.dtype, found.clusters.dtype) == (np.int64, np.int64)
        assert found.values.dtype == np.float64 and np.isfinite(found.values).all()
        assert len(set(found.doc_ids.tolist())) == len(found.doc_ids)


def test_every_mean_has_its_metrics(scores):
    assert "ethics_mean" in MEANS and "ethics_auroc_mean" in MEANS
    for metric in (x for metrics_of_mean in MEANS.values() for x in metrics_of_mean):
        assert metric in scores


def test_truthfulqa_by_hand(items, scores):
    mc1, mc2 = items["truthfulqa_mc1"], items["truthfulqa_mc2"]
    expected = {}
    normalised = [choices_of(x) / choices_of(x, "num_tokens") for x in mc1]
    expected["mc1_length_normalised"] = [float(x.argmax() == 0) for x in normalised]
    pmi = [choices_of(x) - choices_of(x, "answer_only_loglikelihood") for x in mc1]
    expected["mc1_pmi"] = [float(x.argmax() == 0) for x in pmi]
    expected["mc1_binary"] = [float(choices_of(x)[0] > choices_of(x)[1]) for x in mc1]
    shares = []
    for item in mc2:
        p = np.exp(choices_of(item, "answer_only_loglikelihood"))
        shares.append(p[: item["gold"].index(0)].sum() / p.sum())
    expected["mc2_answers_only"] = shares
    for name, values in expected.items():
        assert scores[f"truthfulqa_{name}"].values == pytest.approx(values), name


def test_sharpness_matched_has_the_bases_entropy(root):
    """A copy of the base that is only sharper is the base; mc2 itself says it is another model."""
    base = {"truthfulqa_mc2": make_items(root, 0)["truthfulqa_mc2"]}
    sharper = deepcopy(base)
    for item in sharper["truthfulqa_mc2"]:
        for choice in item["choices"]:
            choice["loglikelihood"] *= 3
        p = np.exp(choices_of(item) - choices_of(item).max())
        item["score"] = p[: item["gold"].index(0)].sum() / p.sum()
    own, matched = document_scores(base), document_scores(sharper, base)
    values = matched["truthfulqa_mc2_sharpness_matched"].values
    assert values == pytest.approx(own["truthfulqa_mc2"].values, abs=1e-6)
    assert np.abs(matched["truthfulqa_mc2"].values - own["truthfulqa_mc2"].values).max() > 0.1
    assert "truthfulqa_mc2_sharpness_matched" not in own


def test_ethics_against_scikit_learn(items, scores):
    for name in (x for x in items if x.startswith("ethics")):
        yes = TASKS[name].answer_of_label_1
        gold = [item["gold"] == yes for item in items[name]]
        odds = [choices_of(item)[yes] - choices_of(item)[1 - yes] for item in items[name]]
        said = [item["prediction"] == yes for item in items[name]]
        area, balanced = (scores[f"{name}_{x}"].values.mean() for x in ("auroc", "balanced"))
        assert area == pytest.approx(metrics.roc_auc_score(gold, odds))
        assert balanced == pytest.approx(metrics.balanced_accuracy_score(gold, said))
        per_token = [
            np.argmax(choices_of(item) / choices_of(item, "num_tokens")) == item["gold"]
            for item in items[name]
        ]
        assert scores[f"{name}_per_token"].values.mean() == pytest.approx(np.mean(per_token))


def test_short_and_long_commonsense_are_the_files(items, scores, root):
    short, long = (scores[f"ethics_commonsense_{x}"] for x in ("short", "long"))
    assert short.doc_ids.tolist() == list(range(2109))  # the posts come last
    assert long.doc_ids.tolist() == list(range(2109, 3885))
    right = [item["score"] for item in items["ethics_commonsense"]]
    assert long.values.tolist() == right[2109:]


def test_virtue_ranked_is_the_one_trait_of_five(items, scores):
    yes = [choices_of(x)[0] - choices_of(x)[1] for x in items["ethics_virtue"]]
    gold = [item["gold"] == 0 for item in items["ethics_virtue"]]
    groups = np.array(yes).reshape(-1, 5).argmax(1), np.array(gold).reshape(-1, 5).argmax(1)
    expected = np.repeat(groups[0] == groups[1], 5)
    assert scores["ethics_virtue_ranked"].values.tolist() == expected.tolist()


def test_clusters_are_scenarios_and_categories(scores, items, root):
    assert len(set(scores["ethics_virtue_auroc"].clusters.tolist())) == 995
    assert len(set(scores["ethics_utilitarianism"].clusters.tolist())) == 4808
    # 38 categories, and a question that TruthfulQA.csv words otherwise, on its own
    assert len(set(scores["truthfulqa_mc2"].clusters.tolist())) == 39
    assert [x["doc_id"] for x in items["truthfulqa_mc1"] if "category" not in x] != []
    assert CATEGORIES in describe_data(["truthfulqa_mc1"], root)


def test_answers_only_has_the_examples_and_no_question(root):
    documents = load_documents(["truthfulqa_mc1", "ethics_virtue"], root, 3)
    for document in documents["truthfulqa_mc1"]:
        context = document.requests[0][0]
        question = context.rpartition("\n\n")[2]
        assert context.replace(question, "A:") == ANSWER_ONLY
        assert document.answers_only == tuple((ANSWER_ONLY, x) for _, x in document.requests)
    assert documents["ethics_virtue"][0].answers_only == ()


def test_a_csv_without_categories_gives_none(tmp_path, root):
    folder = tmp_path / "truthfulqa"
    folder.mkdir()
    (folder / "mc_task.json").write_bytes((root / "truthfulqa" / "mc_task.json").read_bytes())
    (folder / "TruthfulQA.csv").write_text("Question,Best Answer\n1,2\n")
    documents = load_documents(["truthfulqa_mc1"], tmp_path)["truthfulqa_mc1"]
    assert {document.category for document in documents} == {None}


def older(items: dict) -> dict:
    """As written before these metrics existed."""
    items = json.loads(json.dumps(items))
    for item in (item for rows in items.values() for item in rows):
        for key in ("category", "part"):
            item.pop(key, None)
        for choice in item["choices"]:
            choice.pop("answer_only_loglikelihood", None)
    return items


def test_older_items_have_what_they_allow(items, scores):
    found = document_scores(older(items))
    gone = {"truthfulqa_mc2_sharpness_matched", "ethics_commonsense_short"}
    gone |= {"ethics_commonsense_long"}
    gone |= {f"truthfulqa_{x}_{y}" for x in ("mc1", "mc2") for y in ("answers_only", "pmi")}
    assert set(scores) - set(found) == gone
    rows, missing = compare_beside(older(items), items)
    assert set(missing) == gone - {"truthfulqa_mc2_sharpness_matched"}
    assert rows["truthfulqa_mc2"]["length_normalised"]["difference"] == 0


def test_an_older_base_costs_no_clusters(root):
    a, b = (make_items(root, seed, limit=300) for seed in (8, 9))
    rows = [compare_beside(*pair)[0]["truthfulqa_mc2"] for pair in ((a, b), (older(a), b))]
    assert rows[0]["length_normalised"] == rows[1]["length_normalised"]


def test_other_documents_of_the_base_are_an_error(items, root):
    with pytest.raises(UserError, match="the base model was not scored on the same documents"):
        document_scores(items, make_items(root, 1, limit=100))


def test_differences_are_those_of_the_summaries(root):
    a, b = (make_items(root, seed, limit=200) for seed in (3, 4))
    first, second = summarize_beside(a), summarize_beside(b)
    rows, missing = compare_beside(a, b)
    assert not missing
    for task, kinds in first.items():
        for kind, row in kinds.items():
            assert rows[task][kind]["acc_a"] == pytest.approx(row["acc"])
            assert rows[task][kind]["acc_b"] == pytest.approx(second[task][kind]["acc"])
            low, high = rows[task][kind]["interval"]
            assert low <= rows[task][kind]["difference"] <= high
            assert row["interval"][0] <= row["acc"] <= row["interval"][1]
    accs = [first[task]["auroc"]["acc"] for task in first if "auroc" in first[task]]
    assert len(accs) == 6 and np.mean(accs[:5]) == pytest.approx(
        first["ethics_mean"]["auroc"]["acc"]
    )


def test_gain_of_a_model_that_prefers_long_choices_goes_along_with_length(root):
    base = make_items(root, 5)["truthfulqa_mc2"]
    tuned = deepcopy(base)
    for item in tuned:
        for choice in item["choices"]:
            choice["loglikelihood"] += 0.5 * choice["num_tokens"]
        p = np.exp(choices_of(item) - choices_of(item).max())
        item["score"] = p[: item["gold"].index(0)].sum() / p.sum()
    style = gain_and_style(base, tuned)
    assert style["length"]["choices"] == pytest.approx(1.0)
    assert style["length"]["documents"] > 0.3
    assert abs(style["hedges"]["choices"]) < style["length"]["choices"]
    none = gain_and_style(base, base)
    assert none["length"] == {"documents": None, "choices": None}


def test_correlation_is_numpys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
