"""The page of trade-offs says what its record says, and the picture shows it."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import typer

from ace_triton.study.workbench import Protocol
from benchmarks.reports import tradeoff
from benchmarks.reports.machines import this_machine, title
from benchmarks.reports.tradeoff import PICTURE, add_result, is_current, of_model, read, setting_of, state_of
from benchmarks.reports.tradeoff_forms import FORMS, OURS, RECOVERED_FORMS, STEP_FORMS
from benchmarks.reports.tradeoff_page import advice, page
from benchmarks.reports.tradeoff_picture import picture
from benchmarks.reports.tradeoff_points import points_of, shown_speeds

MACHINE = {"processor": "a processor", "instruction set": "avx2"}
OTHER = {"processor": "a processor", "instruction set": "avx512"}
SETTING = setting_of(Protocol("model", "calibration", "evaluation"), "balanced")
UNPRUNED = {"fp32": (4.0, 30.0, 1.0), "bf16": (2.0, 30.1, 0.5), "F16": (2.0, 30.0, 1.5), "Q8_0": (1.06, 30.2, 3.0)}
UNPRUNED |= {"8 bits": (1.02, 30.3, 2.5), "Q4_K_M": (0.65, 32.0, 4.0), "Q4_0": (0.56, 33.0, 5.0)}
UNPRUNED |= {"Q3_K_M": (0.6, 36.0, 4.0), "Q2_K": (0.58, 50.0, 4.0)}


def record(pruned, *, speed=True, leave_out=()):
    """A record with all forms that are not pruned, and with {form: (size, perplexity, faster)} of pruned ones."""
    values = {str(form): UNPRUNED[form.weights] for form in FORMS if not form.pattern} | pruned
    all_forms = (*FORMS, *RECOVERED_FORMS)
    chosen = [form for form in all_forms if str(form) in values and str(form) not in leave_out]
    sizes, times = [], []
    for form in chosen:
        size, perplexity, faster = values[str(form)]
        own = {"form": asdict(form), "head_bits": form.head_bits, "date": "", "version": "engine 1"}
        sizes.append({**own, "perplexity": perplexity, "bytes_per_weight": size, "file_bytes": 10**8})
        facts = {"rounds": 3, "new_tokens": 8, "dense_tokens_per_second": 20.0}
        decoder = {"decoder": "compiled"} if form.engine == OURS and not form.pattern else {}
        times.append({**own, **decoder, **facts, "tokens_per_second": 20 * faster, "over_dense": faster})
    machines = [{"environment": MACHINE, "speed": times}] if speed else []
    found = {"setting": SETTING, "perplexity": sizes, "machines": machines}
    return {"shown": title(MACHINE), "models": {"a model": found}}


def speeds(content):
    """The speeds of the only model on the only machine of a record."""
    (found,) = content["models"].values()
    (machine,) = found["machines"]
    return machine["speed"]


def on_another_machine(content, times):
    """A record whose model was also measured on another machine: there pruned forms are so many times as fast."""
    content = copy.deepcopy(content)
    (found,) = content["models"].values()
    others = copy.deepcopy(speeds(content))
    for entry in others:
        entry["over_dense"] *= times if entry["form"]["pattern"] else 1
        entry["date"] = "2027"
    found["machines"].append({"environment": OTHER, "speed": others})
    return content


def test_it_says_not_to_prune_if_a_form_without_pruning_is_always_better():
    text = page(record({"2:4 bf16": (1.12, 100.0, 1.4), "8:16 4 bits": (0.6, 60.0, 2.0)}))
    assert "**Do not prune for size: at every limit in the table a form that is not pruned has the lowest" in text
    assert "The smallest of them is llama.cpp Q4_0 (0.56 bytes a weight, 1.10 times the dense perplexity).**" in text
    assert "**Do not prune for speed: at every limit in the table a form that is not pruned has the lowest" in text
    assert "The fastest of them is llama.cpp Q4_0 (0.56 bytes a weight, 5.00 times the dense speed, 1.10" in text
    assert "| 0.6 | llama.cpp Q4_0 | 33.0 (1.10x) | 8:16 4 bits | 60.0 (2.00x) |" in text
    assert "(no other form is better in one and as good in the other): llama.cpp Q4_0; llama.cpp Q4_K_M;" in text
    assert "None of these 5 forms is pruned." in text


def test_it_names_a_pruned_form_that_is_best_and_says_what_it_costs():
    text = page(record({"8:16 4 bits": (0.38, 60.0, 6.5), "2:4 4 bits": (0.35, 90.0, 2.0)}))
    assert (
        "**A pruned form is the best one at some limit of size: 8:16 4 bits (0.38 bytes a weight, 2.00 times the dense "
        "perplexity; no form without pruning is as small)" in text
    )
    assert "**A pruned form is the best one at some limit of speed: 8:16 4 bits (0.38 bytes a weight, 6.50" in text
    assert "| 6 | 8:16 4 bits | 60.0 (2.00x) | 8:16 4 bits | 60.0 (2.00x) |" in text
    assert "| 4 | llama.cpp Q4_K_M | 32.0 (1.07x) | 8:16 4 bits | 60.0 (2.00x) |" in text


def test_limits_are_compared_with_the_values_that_the_page_shows():
    text = page(record({"8:16 4 bits": (0.404, 60.0, 3.996), "2:4 4 bits": (0.406, 50.0, 3.994)}))
    assert "| 0.4 | 8:16 4 bits | 60.0 (2.00x) | 8:16 4 bits | 60.0 (2.00x) |" in text
    assert "| 4 | llama.cpp Q4_K_M | 32.0 (1.07x) | 8:16 4 bits | 60.0 (2.00x) |" in text


def test_different_numbers_of_tokens_and_rounds_are_a_range():
    content = record({"2:4 bf16": (1.12, 100.0, 1.4)})
    assert "8 greedy tokens, medians over 3 rounds." in page(content)
    speeds(content)[0].update(new_tokens=64, rounds=7)
    assert "8 to 64 greedy tokens, medians over 3 to 7 rounds." in page(content)


def test_its_advice_names_the_limits_at_which_a_pruned_form_is_best():
    """The sentence of the README is by the rule of the page."""

    def advised(pruned, **options):
        content = record(pruned, **options)
        found = content["models"]["a model"]
        return advice("a model", points_of(found, shown_speeds(content, found)))

    small = {"8:16 4 bits": (0.38, 60.0, 2.0)}
    assert advised(small).startswith(
        "A pruned form of a model is the best one only if you need at most 0.5 bytes a weight and at most 0.4 bytes"
    )
    fast = advised({"8:16 4 bits": (0.6, 60.0, 6.5)})
    assert "only if you need at least 6 times the tokens a second of dense fp32; within every other limit of" in fast
    beaten = {"2:4 bf16": (1.12, 100.0, 1.4)}
    assert advised(beaten).startswith("Do not prune a model for size or speed: within every limit that")
    assert advised(beaten, speed=False).startswith("Do not prune a model for size: within every limit")
    assert advised(small, leave_out=["llama.cpp Q4_0"]).startswith("Whether to prune a model is not decided yet")


def test_all_speeds_are_those_beside_the_dense_model():
    content = record({"2:4 bf16": (1.12, 100.0, 1.4)})
    first, second, *_ = speeds(content)
    first.update(over_dense=0.95, tokens_per_second=11.9, dense_tokens_per_second=12.4)
    second.update(tokens_per_second=77.7)
    text = page(content)
    assert "| dense fp32 | 30.00 | 4.00 | 100 MB | 1.00 |" in text
    assert (
        "The dense model made 12.4 to 20.0 tokens a second in these runs. Noise: a second copy of the dense model, "
        "measured in the same way, came out at 0.95 times its own speed." in text
    )
    assert "77.7" not in text


def test_it_decides_nothing_before_all_forms_without_pruning_are_measured():
    text = page(record({"2:4 4 bits": (0.35, 90.0, 2.0)}, speed=False, leave_out=["llama.cpp Q4_0"]))
    sentence = "**Not decided yet. Not measured: llama.cpp Q4_0. The tables show the best of the forms that are"
    assert sentence in text
    assert text.index(sentence) < text.index("| bytes a weight, at most |")
    assert "Speeds are not measured yet." in text
    assert "best one at some limit" not in text


def test_the_dense_model_in_the_compiled_step_has_the_dense_perplexity_and_its_own_speed():
    content = record({"2:4 bf16": (1.12, 100.0, 1.4)})
    times = speeds(content)
    (pruned,) = [entry for entry in times if entry["form"]["pattern"]]
    times.append({**times[0], "form": asdict(STEP_FORMS[0]), "over_dense": 2.5})
    assert "0 of 1 speeds of pruned forms are with the [compiled step]" in page(content)
    assert not is_current(pruned)
    pruned["decoder"] = "compiled"
    text = page(content)
    assert "Pruned forms decode with the [compiled step](guides/run-sparse.md#the-compiled-step)." in text
    assert "| dense, compiled step, fp32 | 30.00 | 4.00 | 100 MB | 2.50 |" in text
    assert [entry for entry in times if not is_current(entry)] == []


def test_a_recovered_form_is_on_the_page_and_in_the_picture_if_it_was_measured():
    content = record({"8:16 8 bits": (0.55, 60.0, 4.0)})
    assert "recovered" not in page(content) + picture(content)
    form, *_ = RECOVERED_FORMS
    assert state_of(content, "a model", form) == "not measured, only with --form"
    content = record({"8:16 8 bits": (0.55, 60.0, 4.0), "8:16 8 bits, recovered": (0.55, 31.0, 4.0)})
    assert state_of(content, "a model", form) == "perplexity"  # Its speed lacks the compiled step.
    text = page(content)
    assert "| 8:16 8 bits, recovered | 31.00 | 0.55 | 100 MB | 4.00 |" in text
    assert "Recovered forms are trained for 259 optimizer steps of 256 tokens of the calibration text" in text
    assert "**A pruned form is the best one at some limit of size: 8:16 8 bits, recovered (0.55 bytes" in text
    assert ">8:16 8 bits, recovered</text>" in picture(content)


def test_results_of_another_setting_are_not_mixed(tmp_path):
    content = read(tmp_path)
    of_model(content, "a model", SETTING)
    assert of_model(content, "a model", dict(SETTING)) is content["models"]["a model"]
    with pytest.raises(typer.BadParameter, match="measured with windows 20, not 40: give the same, or remove a model"):
        of_model(content, "a model", {**SETTING, "windows": 40})


def test_the_page_and_the_picture_are_those_of_the_record():
    docs = Path(__file__).resolve().parents[2] / "docs"
    content = read(docs)
    assert (docs / "tradeoff.md").read_text() == page(content)
    assert (docs / PICTURE).read_text() == picture(content)


def test_the_page_has_the_speeds_of_each_machine_the_shown_one_first():
    one = record({"8:16 4 bits": (0.6, 60.0, 6.5)})
    both = on_another_machine(one, 2)
    text = page(both)
    places = [text.index(f"### Speed on a processor, {isa}\n") for isa in ("avx2", "avx512")]
    assert places == sorted(places)
    assert "| 8:16 4 bits | 60.00 | 0.60 | 100 MB | 6.50 | 13.00 |" in text
    words = "times the tokens a second of dense fp32"
    assert f"| files | {words}, a processor, avx2 | {words}, a processor, avx512 |" in text
    assert "| dense fp32 | 30.00 | 4.00 | 100 MB | 1.00 | 1.00 |" in text
    del both["shown"]
    text = page(both)
    assert text.index("### Speed on a processor, avx512\n") < text.index("### Speed on a processor, avx2\n")


def test_a_machine_without_some_speed_of_a_form_that_is_not_pruned_decides_nothing():
    both = on_another_machine(record({"8:16 4 bits": (0.6, 60.0, 6.5)}), 2)
    (found,) = both["models"].values()
    other = found["machines"][1]["speed"]
    other[:] = [entry for entry in other if entry["form"]["weights"] != "Q4_0"]
    text = page(both)
    assert text.count("**Not decided on this machine. Not timed on it: llama.cpp Q4_0.") == 1
    place = text.index("### Speed on a processor, avx512\n")
    assert "**Not decided on this machine." not in text[:place]
    assert "best one at some limit of speed" not in text[place:]


def test_the_picture_and_the_advice_are_of_the_shown_machine():
    one = record({"8:16 4 bits": (0.6, 60.0, 6.5)})
    both = on_another_machine(one, 2)
    assert picture(both) == picture(one)
    both["shown"] = title(OTHER)
    assert ">speeds: a processor, avx512</text>" in picture(both)
    (found,) = both["models"].values()
    assert "at least 8 times" not in advice("a model", points_of(found, shown_speeds(one, found)))
    assert "at least 8 times" in advice("a model", points_of(found, shown_speeds(both, found)))
    both["shown"] = "a machine without speeds"
    assert "speeds: not measured yet" in picture(both)


def test_a_speed_is_kept_with_the_machine_that_measured_it():
    content = record({"8:16 4 bits": (0.6, 60.0, 6.5)})
    (found,) = content["models"].values()
    before = copy.deepcopy(found)
    entry = speeds(content)[-1]
    for faster in (3.0, 4.0):
        add_result(found, "speed", {**entry, "over_dense": faster})
    here = {"environment": this_machine(), "speed": [{**entry, "over_dense": 4.0}]}
    assert found == {**before, "machines": [*before["machines"], here]}
    add_result(found, "perplexity", {**before["perplexity"][-1], "perplexity": 50.0})
    assert [e["perplexity"] for e in found["perplexity"]] == [*(e["perplexity"] for e in before["perplexity"][:-1]), 50]


def test_the_shown_machine_must_be_one_with_speeds(tmp_path):
    content = on_another_machine(record({"8:16 4 bits": (0.6, 60.0, 6.5)}), 2)
    (tmp_path / "tradeoff.json").write_text(json.dumps(content))
    tradeoff.main(show=title(OTHER), out=tmp_path)
    assert read(tmp_path) == {**content, "shown": title(OTHER)}
    assert ">speeds: a processor, avx512</text>" in (tmp_path / PICTURE).read_text()
    tradeoff.main(show=title(MACHINE), listed=True, out=tmp_path)
    assert ">speeds: a processor, avx2</text>" in (tmp_path / PICTURE).read_text()
    with pytest.raises(typer.BadParameter, match=r"must be a machine .*'a processor, avx2'; 'a processor, avx512'"):
        tradeoff.main(show="another", out=tmp_path)


def test_a_record_without_a_shown_machine_shows_the_first_that_is_measured():
    content = {"models": {}}
    found = of_model(content, "a model", SETTING)
    tradeoff.show_first(content)
    assert "shown" not in content
    add_result(found, "speed", {**speeds(record({}))[0]})
    tradeoff.show_first(content)
    assert content["shown"] == title(this_machine())
