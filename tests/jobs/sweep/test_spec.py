"""The section `sweep` of job.yaml: what is refused, with its field and line, and the points that it stands for."""

from pathlib import Path

import pytest
import yaml

from knapper import limits
from knapper.jobs import spec, yaml_document
from knapper.jobs.spec import AnyJob
from knapper.jobs.sweep import points, search
from knapper.jobs.sweep.search import TriedPoint
from knapper.jobs.yaml_document import JobError
from tests.jobs.sweep.sweeps import BASE

ROOT = Path(__file__).parents[3]
TPE = "sweep:\n  method: tpe\n  over:\n    optimizer.learning_rate: {low: 1.0e-4, high: 0.1, log: true}\n"


def swept(section: str, base: str = BASE) -> AnyJob:
    return spec.parse((base + section).encode()).job


@pytest.mark.parametrize(
    ("section", "field", "words"),
    [
        ("sweep: {}", "sweep.over", "required"),
        ("sweep: {over: {}}", "sweep.over", "length >= 1"),
        ("sweep: {over: {steps: 3}}", "sweep.over.steps", "a list of values, or a range"),
        ("sweep: {over: {steps: []}}", "sweep.over.steps", "length >= 1"),
        ("sweep: {over: {steps: [2, 2]}}", "sweep.over.steps", "each value once"),
        ("sweep: {over: {steps: [2, 0]}}", "sweep.over.steps", ">= 1"),
        ("sweep: {over: {lora.rank: [2, 999]}}", "sweep.over.lora.rank", "<= 256"),
        ("sweep: {over: {lora.size: [2, 4]}}", "sweep.over.lora.size", "only rank, alpha"),
        ("sweep: {over: {Steps: [2]}}", "sweep.over", "names of fields"),
        ("sweep: {over: {data.x: [a]}}", "sweep.over.data.x", "its `data` has none inside"),
        ("sweep: {over: {kind: [rl]}}", "sweep.over.kind", "none of kind, base_model, evaluate, sweep"),
        ("sweep: {over: {evaluate.data: [a]}}", "sweep.over.evaluate.data", "none of kind"),
        ("sweep: {over: {lora: [{rank: 2}], lora.rank: [2]}}", "sweep.over.lora.rank", "none beside lora"),
        ("sweep: {over: {steps: [2, 3]}, metric: loss}", "sweep.metric", "loss/mean"),
        ("sweep: {over: {steps: [2, 3]}, method: bayes}", "sweep.method", "enum value"),
        ("sweep: {over: {steps: [2, 3]}, at_once: 0}", "sweep.at_once", ">= 1"),
        ("sweep: {over: {steps: [2, 3]}, budget: {trials: 0}}", "sweep.budget.trials", ">= 1"),
        ("sweep: {over: {steps: {low: 2, high: 3}}}", "sweep.over.steps", "as the method is grid"),
        (TPE, "sweep.budget", "`trials` or `device_seconds`"),
        (TPE.replace("0.1", "2") + "  budget: {trials: 2}", "sweep.over.optimizer.learning_rate", "<= 1.0"),
        (TPE.replace("0.1", "0.0001"), "sweep.over.optimizer.learning_rate.high", "above low"),
        (TPE.replace("1.0e-4", "0.0"), "sweep.over.optimizer.learning_rate.low", "above 0 where `log`"),
        (TPE.replace("log: true", "log: true, step: 0.01"), "sweep.over.optimizer.learning_rate.step", "none where"),
        (TPE.replace("log: true", "step: 3.0"), "sweep.over.optimizer.learning_rate.step", "above 0, to"),
        (TPE.replace("log: true", "base: 2"), "sweep.over.optimizer.learning_rate.base", "only low, high, log, step"),
    ],
)
def test_what_is_wrong_is_refused_with_its_field_and_its_line(section: str, field: str, words: str) -> None:
    with pytest.raises(JobError) as caught:
        swept(section)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert caught.value.line > BASE.count("\n")


def test_a_sweep_needs_held_out_rows() -> None:
    section = "sweep: {over: {steps: [2, 3]}}"
    with pytest.raises(JobError, match="only beside `evaluate:`"):
        swept(section, BASE.replace("evaluate: {data: e.jsonl}\n", ""))
    with pytest.raises(JobError, match="none for episodes"):
        swept(section, "kind: episodes\ndata: p.jsonl\nsteps: 2\n")


def test_the_largest_grid_and_one_more() -> None:
    half = limits.sweep_trials_max // 20
    section = "sweep: {over: {seed: %s, lora.seed: %s}}"
    assert swept(section % (list(range(half)), list(range(20)))).sweep is not None
    with pytest.raises(JobError, match=f"at most {limits.sweep_trials_max}"):
        swept(section % (list(range(half + 1)), list(range(20))))
    with pytest.raises(JobError, match=f"length <= {limits.sweep_values_max}"):
        swept(f"sweep: {{over: {{seed: {list(range(limits.sweep_values_max + 1))}}}}}")


def test_a_file_of_any_point_is_a_file_of_the_sweep() -> None:
    parsed = spec.parse((BASE + "sweep: {over: {data: [p.jsonl, q.jsonl]}}").encode())
    assert parsed.files == ["p.jsonl", "e.jsonl", "q.jsonl"]
    assert [job.data for job in parsed.jobs] == ["p.jsonl", "q.jsonl"]


def test_the_job_yaml_of_a_point_is_read_as_that_point() -> None:
    texts = ["1e-4", "0x1f", "true", "2024-01-01", "~", "- a", "ü", "a: b", "1_000"]
    content = {"kind": "sft", "sampling": {"stop": texts}, "optimizer": {"eps": 1e-12}, "sweep": {"over": {}}}
    written = points.job_yaml(content, {"optimizer.learning_rate": 1e-05, "lora.rank": 4, "lora.train_mlp": False})
    assert yaml_document.read(written).content == {
        "kind": "sft",
        "sampling": {"stop": texts},
        "optimizer": {"eps": 1e-12, "learning_rate": 1e-05},
        "lora": {"rank": 4, "train_mlp": False},
    }


def test_draws_are_in_range_seeded_and_of_the_fields_types() -> None:
    section = TPE + "    lora.rank: {low: 2, high: 8, step: 3}\n    optimizer.schedule: [constant, linear]\n"
    sweep = swept(section + "  budget: {trials: 9}\n").sweep
    assert sweep is not None
    tried: list[TriedPoint] = []
    for n in range(12):
        drawn = search.draw(sweep, "minimize", tried)
        assert drawn == search.draw(sweep, "minimize", tried), "a function of what was tried"
        assert 1e-4 <= drawn["optimizer.learning_rate"] <= 0.1
        assert drawn["lora.rank"] in (2, 5, 8)
        assert isinstance(drawn["lora.rank"], int)
        assert drawn["optimizer.schedule"] in ("constant", "linear")
        tried.append(TriedPoint(drawn, None if n == 3 else drawn["optimizer.learning_rate"], ended=n != 5))
    assert len({str(each.point) for each in tried}) == len(tried)


def test_the_example_of_the_page_is_a_sweep() -> None:
    page = (ROOT / "docs" / "jobs.md").read_text()
    example = page.partition("\n### Sweeps\n")[2].partition("```yaml\n")[2].partition("```")[0]
    sweep = swept(example).sweep
    assert sweep is not None
    assert sweep.planned == 6
    shown = yaml.safe_load((ROOT / "examples" / "jobs" / "sweep" / "job.yaml").read_text())["sweep"]
    assert shown == yaml.safe_load(example)["sweep"], "the page shows the example's"


def test_the_example_beside_the_others_is_a_job_with_its_files() -> None:
    folder = ROOT / "examples" / "jobs" / "sweep"
    parsed = spec.parse((folder / "job.yaml").read_bytes())
    assert len(parsed.jobs) == 6
    assert all((folder / name).exists() for name in parsed.files)
