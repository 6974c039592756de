"""Tasks of lm-evaluation-harness on local data, against log-likelihoods computed here."""

import json

import pytest
import torch

QUESTIONS = [
    {"question": f"{first} fox jumps", "choices": [" over", f" {first}", " the lazy dog"], "answer": index % 3}
    for index, first in enumerate(["A", "The quick brown", "one", "No", "Every", "That"])
]

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "local.yaml").write_text(TASK.format(data=tmp_path / "questions.json"))
    return folder


def accuracy(model, tokenizer) -> float:
    """Share of the questions to which the right choice has the largest log-likelihood."""
    right = 0
    for entry in QUESTIONS:
        prompt = tokenizer(entry["question"]).input_ids
        values = []
        for choice in entry["choices"]:
            own = tokenizer(choice).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + own])).logits[0].float().log_softmax(-1)
            values.append(sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(own)))
        right += max(range(3), key=values.__getitem__) == entry["answer"]
    return right / len(QUESTIONS)


def test_dense_and_packed_score_as_computed_here(
    command, tiny_checkpoint, tiny_model, tokenizer, task_folder, tmp_path
):
    pytest.importorskip("lm_eval")
    assert command("prune", tiny_checkpoint, tmp_path / "pruned", "--method", "magnitude")[0] == 0
    assert command("pack", tmp_path / "pruned", tmp_path / "packed")[0] == 0
    found = {}
    for name in ("tiny", "pruned", "packed"):
        words = ("--tasks", "local_choice", "--tasks-folder", task_folder, "--json", tmp_path / "scores.json")
        code, out, errors = command("evaluate", tmp_path / name, *words)
        assert code == 0, errors
        assert "local_choice" in out
        found[name] = json.loads((tmp_path / "scores.json").read_text())
    [score] = found["tiny"]["tasks"]
    assert score["value"] == pytest.approx(accuracy(tiny_model, tokenizer))
    assert (score["metric"], score["samples"], score["shots"]) == ("acc", 6, 0)
    assert found["packed"]["tasks"] == found["pruned"]["tasks"]
    code, _, errors = command("evaluate", tiny_checkpoint, "--tasks", "no_such_task")
    assert code == 1
    assert "unknown task no_such_task" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--limit", "3"), "--limit needs --tasks"),
        (("--tasks", "arc_easy", "--stream"), "leave --stream out"),
    ],
)
def test_options_that_do_not_go_together(command, tiny_checkpoint, words, message):
    code, _, errors = command("evaluate", tiny_checkpoint, *words)
    assert code == 1
    assert message in errors


def test_without_the_package_the_error_says_how_to_get_it(command, tiny_checkpoint, monkeypatch):
    import ace_triton.task_evaluation as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    code, _, errors = command("evaluate", tiny_checkpoint, "--tasks", "arc_easy")
    assert code == 1
    assert "--tasks needs lm_eval: pip install 'ace-triton[lm-eval]'" in errors
