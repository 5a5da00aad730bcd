"""The command `samplewise score`, from its arguments to its files."""

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import make_dataclass
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from samplewise.attribution import score_batches
from samplewise.cli.files import write_text
from samplewise.cli.fingerprint import data_digest
from samplewise.cli.main import main

SETUP = """
import os, time
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from samplewise.attribution import ScoreTask

SAMPLES = 40

def per_sample_loss(model, batch):
    inputs, targets = batch
    time.sleep(float(os.environ.get("SECONDS_PER_BATCH", 0)))
    logits = model(inputs)
    return F.cross_entropy(logits, targets, reduction="none"), logits

def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 1, 6, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.arange(SAMPLES) % 3)

def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 3)).double()

def setup():
    return ScoreTask(network(), data(), per_sample_loss, class_names=["<b>", "cat", "dog"])
"""


@pytest.fixture(autouse=True)
def _one_thread():
    # Tests run side by side, and small networks gain nothing from more.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SETUP)
    return path


def edited(file, old, new):
    assert old in SETUP
    file.write_text(SETUP.replace(old, new))
    return file


def columns(directory):
    return pq.read_table(directory / "scores.parquet").to_pydict()


def facts(directory):
    return yaml.safe_load((directory / "run.yaml").read_text())


def assert_same_scores(first, second):
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values == pytest.approx(second[name], rel=1e-12), name


def refused(capsys, *arguments):
    """Run a command that must fail with one line; the line."""
    assert main(["score", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("samplewise: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def refused_at_the_end(capsys, *arguments):
    """Run a command that fails after its first words; its last line."""
    assert main(["score", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


# the embedded example


def test_the_embedded_example(tmp_path, capsys):
    assert main(["score", "--epochs", "2", "--out", "a"]) == 0
    captured = capsys.readouterr()
    assert "1,797 samples" in captured.out
    assert "100.0% of 15,434 trainable parameters covered" in captured.out
    assert re.search(r"EL2N\s+\d+ of 90\s+0\.\d{3}\s+0\.\d{3}", captured.out)
    assert "training: 3,594 of 3,594" in captured.err
    assert "scoring: 1,797 of 1,797" in captured.err
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["report.html", "run.yaml", "scores.parquet"]
    scores = columns(tmp_path / "a")
    assert scores["index"] == list(range(1797))
    assert sum(scores["known_mislabelled"]) == 90
    first = sorted(range(1797), key=lambda row: -scores["el2n"][row])[:90]
    assert sum(scores["known_mislabelled"][row] for row in first) > 70  # far above the 4 or 5 of a random order
    assert (tmp_path / "a" / "report.html").read_text().count("data:image/png;base64") >= 40


def test_the_embedded_example_goes_on_with_the_model_it_has_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("samplewise.cli.score.score_batches", interrupted)
    assert main(["score", "--epochs", "1", "--out", "a"]) == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("samplewise.cli.digits.train", None)
    assert main(["score", "--epochs", "1", "--out", "a", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["detection"]["el2n"]["known"] == 90


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


# files and output


def test_files_of_a_users_own_task(tmp_path, file, capsys):
    assert main(["score", f"{file}:setup", "--batch-size", "7"]) == 0
    directory = tmp_path / "runs" / "mine"
    scores = columns(directory)
    names = ["index", "loss", "grad_norm", "el2n", "target", "prediction", "probability", "grad_norm.1", "grad_norm.3"]
    assert list(scores) == names
    assert scores["index"] == list(range(40))
    assert scores["target"] == [index % 3 for index in range(40)]
    for whole, first, second in zip(scores["grad_norm"], scores["grad_norm.1"], scores["grad_norm.3"], strict=True):
        assert whole == pytest.approx((first**2 + second**2) ** 0.5)
    schema = pq.read_schema(directory / "scores.parquet")
    assert all(schema.field(name).metadata[b"description"] for name in names)
    run = facts(directory)
    assert run["status"] == "finished"
    assert run["counts"] == {"samples": 40, "trainable_parameters": 139, "known_mislabelled": 0}
    assert run["versions"]["torch"] == str(torch.__version__)
    assert "runs/mine/scores.parquet" in capsys.readouterr().out


def test_the_report_is_one_file_and_escapes_what_it_shows(tmp_path, file):
    main(["score", str(file), "--out", "a"])
    report = (tmp_path / "a" / "report.html").read_text()
    assert "&lt;b&gt;" in report
    assert "<dd><b>" not in report
    assert report.count("<svg") == 2
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", report)


def test_names_are_shown_as_they_are(file, capsys):
    edited(file, '["<b>", "cat", "dog"]', '["[/b]", "[red]x", ":smile:"], name=__import__("pathlib").Path("[i]")')
    assert main(["score", str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("[/b]", "[red]x", ":smile:", "[i]"))


def test_names_that_the_terminal_cannot_show(file):
    edited(file, '["<b>", "cat", "dog"]', '["<b>", "猫", chr(0xd800)]')
    command = [sys.executable, "-c", "import sys; from samplewise.cli.main import main; sys.exit(main())", "score", str(file)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    run = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr.decode()


def test_json_is_all_there_is_on_stdout(file, capsys):
    edited(file, "def setup():", "print('imported')\ndef setup():\n    print('called')")
    assert main(["score", str(file), "--json", "--top", "3", "--rank-by", "loss"]) == 0
    summary = json.loads(capsys.readouterr().out)
    losses = [suspect["loss"] for suspect in summary["suspects"]]
    assert (summary["samples"], summary["ranked_by"], len(losses)) == (40, "loss", 3)
    assert losses == sorted(losses, reverse=True)
    assert (summary["coverage"]["share"], summary["coverage"]["elements"]) == (1.0, 139)
    assert 0 < summary["top_share"]["squared_norm"] < 1
    assert sum(summary["group_shares"].values()) == pytest.approx(1)


def test_a_loss_without_logits_ranks_by_gradient_norm(file, capsys):
    edited(file, 'reduction="none"), logits', 'reduction="none")')
    assert main(["score", str(file), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["ranked_by"] == "grad_norm"
    assert list(summary["quantiles"]) == ["loss", "grad_norm"]
    assert main(["score", str(file), "--rank-by", "el2n", "--out", "b"]) == 2
    assert "--rank-by el2n: the loss returned no logits" in capsys.readouterr().err


def test_limit_and_groups(tmp_path, file):
    assert main(["score", str(file), "--out", "a", "--limit", "9", "--groups", "1.weight,3"]) == 0
    scores = columns(tmp_path / "a")
    assert len(scores["index"]) == 9
    assert [name for name in scores if name.startswith("grad_norm.")] == [
        "grad_norm.1.weight",
        "grad_norm.other",
        "grad_norm.3",
    ]


def test_data_workers_change_nothing(tmp_path, file):
    main(["score", str(file), "--out", "a"])
    main(["score", str(file), "--out", "b", "--num-workers", "2", "--batch-size", "3"])
    assert_same_scores(columns(tmp_path / "a"), columns(tmp_path / "b"))


def test_what_only_some_batches_reach_counts_as_covered(tmp_path, file, capsys):
    edited(file, "    logits = model(inputs)", "    logits = model(inputs) if targets[0] == 0 else model[:2](inputs)")
    main(["score", str(file), "--json", "--batch-size", "1"])
    assert json.loads(capsys.readouterr().out)["coverage"]["unreached"] == {}
    edited(file, "    logits = model(inputs)", "    logits = model[:2](inputs)")
    main(["score", str(file), "--json", "--out", "b"])
    coverage = json.loads(capsys.readouterr().out)["coverage"]
    assert coverage["unreached"] == {"3.weight": 12, "3.bias": 3}
    assert coverage["share"] == pytest.approx(124 / 139)


def test_errors_known_as_an_array(file, capsys):
    edited(file, "per_sample_loss, ", "per_sample_loss, known_mislabelled=torch.tensor([3, 4]).numpy(), ")
    main(["score", str(file), "--json", "--limit", "4"])
    assert json.loads(capsys.readouterr().out)["detection"]["loss"]["known"] == 1


def test_texts_are_shown_as_texts(tmp_path, file):
    file.write_text(SETUP.replace("per_sample_loss, ", "per_sample_loss, preview=lambda item: f'<i>{int(item[1])} of three', "))
    main(["score", str(file), "--out", "a"])
    assert "&lt;i&gt;2 of three" in (tmp_path / "a" / "report.html").read_text()


def test_a_preview_that_fails_does_not_cost_the_run(tmp_path, file):
    edited(file, "per_sample_loss, ", "per_sample_loss, preview=lambda item: item[7], ")
    assert main(["score", str(file), "--out", "a"]) == 0
    assert f"{file}:26: IndexError" in (tmp_path / "a" / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("torch.randn(12, 5000)", "data:image/png"),  # long and low: a series, or the frames of a sound
        ("__import__('numpy').array(['a', 'b'])", ""),
        ("__import__('numpy').ones((9, 9), dtype=complex)", ""),
        ("torch.eye(6).to_sparse()", "NotImplementedError"),
        ("'a' + chr(0xd800)", "a?"),  # what Python reads of a file in another encoding
    ],
)
def test_previews_of_any_kind_do_not_cost_the_run(tmp_path, file, content, shown):
    edited(file, "per_sample_loss, ", f"per_sample_loss, preview=lambda item: {content}, ")
    assert main(["score", str(file), "--out", "a"]) == 0
    assert shown in (tmp_path / "a" / "report.html").read_text()


# checkpoints


@pytest.fixture
def weights():
    torch.manual_seed(7)
    network = nn.Sequential(nn.Flatten(), nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return network.state_dict()


def test_checkpoints_of_both_kinds(tmp_path, file, weights):
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.pt")
    main(["score", str(file), "--out", "none"])
    main(["score", str(file), "--out", "a", "--checkpoint", "w.safetensors"])
    main(["score", str(file), "--out", "b", "--checkpoint", "w.pt"])
    assert_same_scores(columns(tmp_path / "a"), columns(tmp_path / "b"))
    assert columns(tmp_path / "a")["loss"] != columns(tmp_path / "none")["loss"]


def test_checkpoints_that_do_not_fit(tmp_path, file, weights, capsys):
    wrong = {**weights, "1.weight": torch.zeros(2, 2), "more": torch.zeros(1)}
    del wrong["3.bias"]
    save_file(wrong, tmp_path / "w.safetensors")
    line = refused(capsys, file, "--checkpoint", "w.safetensors")
    assert "1.weight has shape (2, 2), expected (4, 30); missing 3.bias; unexpected more" in line


def test_a_checkpoint_with_two_values_for_tied_weights(tmp_path, file, capsys):
    edited(file, "nn.Tanh(), nn.Linear(4, 3)", "nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)")
    file.write_text(
        file.read_text().replace(
            "    return ScoreTask(network()",
            "    model = network()\n    model[3].weight = model[2].weight\n    return ScoreTask(model",
        )
    )
    torch.manual_seed(0)
    untied = nn.Sequential(nn.Flatten(), nn.Linear(30, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    torch.save(untied.state_dict(), tmp_path / "w.pt")
    assert "it cannot take 2.weight" in refused(capsys, file, "--checkpoint", "w.pt")
    untied[3].weight = untied[2].weight
    torch.save(untied.state_dict(), tmp_path / "w.pt")
    assert main(["score", str(file), "--checkpoint", "w.pt"]) == 0


def test_a_text_is_no_checkpoint(tmp_path, file, capsys):
    (tmp_path / "w.pt").write_text("hello")
    assert "w.pt cannot be read" in refused(capsys, file, "--checkpoint", "w.pt")


def test_pickled_code_is_never_run(tmp_path, file, capsys):
    torch.save({"weights": Evil()}, tmp_path / "w.pt")
    assert "Pickled code is never run" in refused(capsys, file, "--checkpoint", "w.pt")
    assert not (tmp_path / "evil").exists()


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_a_missing_or_broken_checkpoint(tmp_path, file, capsys):
    assert "there is no such file" in refused(capsys, file, "--checkpoint", "w.pt")
    (tmp_path / "w.safetensors").write_text("no weights")
    assert "not a readable safetensors file" in refused(capsys, file, "--checkpoint", "w.safetensors", "--overwrite")


# resuming


def test_resume_after_a_kill(tmp_path, file, capsys):
    main(["score", str(file), "--out", "whole"])
    command = [sys.executable, "-c", "import sys; from samplewise.cli.main import main; sys.exit(main())"]
    arguments = ["score", str(file), "--out", "a", "--batch-size", "3", "--save-every", "0"]
    slow = {**os.environ, "SECONDS_PER_BATCH": "0.2", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *arguments], env=slow, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and len(list(tmp_path.glob("a/.partial/*.parquet"))) < 3:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert facts(tmp_path / "a")["status"] == "running"
    assert not (tmp_path / "a" / "scores.parquet").exists()
    assert main(["score", str(file), "--out", "a", "--batch-size", "8", "--resume"]) == 0
    assert 9 <= facts(tmp_path / "a")["resumed_at_sample"] < 40
    assert_same_scores(columns(tmp_path / "a"), columns(tmp_path / "whole"))


@pytest.mark.parametrize("moment", ["render", "table.write", "RunDirectory.write_facts", "RunDirectory.finish", "_with_known"])
def test_resume_from_any_step_of_the_end(tmp_path, file, moment, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(f"samplewise.cli.score.{moment}", interrupted)
        assert main(["score", str(file), "--out", "a"]) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(["score", str(file), "--out", "a", "--resume"]) == 0
    assert columns(tmp_path / "a")["index"] == list(range(40))
    assert facts(tmp_path / "a")["status"] == "finished"


def test_an_interruption_keeps_what_is_scored(tmp_path, file, capsys):
    edited(
        file,
        "    logits = model",
        "    calls.append(1)\n    if len(calls) == 7: raise KeyboardInterrupt\n    logits = model",
    )
    file.write_text("calls = []\n" + file.read_text())
    assert main(["score", str(file), "--out", "a", "--batch-size", "4"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("a/.partial/*")] == ["000000000000-000000000008.parquet"]


def test_resume_of_a_finished_run_only_reports(file, monkeypatch, capsys):
    main(["score", str(file), "--out", "a"])
    first = capsys.readouterr().out
    monkeypatch.setattr("samplewise.cli.score._load_task", None)
    assert main(["score", str(file), "--out", "a", "--resume"]) == 0
    assert capsys.readouterr().out == first


def test_what_a_kill_at_the_very_end_left_is_dropped(tmp_path, file):
    main(["score", str(file), "--out", "a"])
    (tmp_path / "a" / ".partial").mkdir()
    main(["score", str(file), "--out", "a", "--resume"])
    assert not (tmp_path / "a" / ".partial").exists()


def test_a_run_that_failed_before_its_first_score_is_replaced(tmp_path, file, capsys):
    edited(file, "return ScoreTask", "return")
    refused(capsys, file, "--out", "a")
    file.write_text(SETUP)
    assert main(["score", str(file), "--out", "a"]) == 0


def test_resume_without_a_run_starts_one(tmp_path, file):
    assert main(["score", str(file), "--out", "a", "--resume"]) == 0
    assert len(columns(tmp_path / "a")["index"]) == 40


def start(file, *arguments, out="a"):
    """Leave an unfinished run in a directory."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("samplewise.cli.score.render", interrupted)
        assert main(["score", str(file), "--out", out, *arguments]) == 130


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--limit", "9"], "limit (was None, is 9)"),
        (["--seed", "1"], "seed (was 0, is 1)"),
        (["--groups", "2"], "groups (was None, is 2)"),
    ],
)
def test_resume_with_other_options_is_refused(file, change, message, capsys):
    start(file)
    capsys.readouterr()
    assert message in refused(capsys, file, "--out", "a", "--resume", *change)


def test_resume_with_another_source_model_or_data_is_refused(tmp_path, file, capsys):
    start(file)
    capsys.readouterr()
    edited(file, "SAMPLES = 40", "SAMPLES = 41")
    assert "another source (was" in refused(capsys, file, "--out", "a", "--resume")
    run = facts(tmp_path / "a")
    file.write_text(SETUP)
    (tmp_path / "a" / "run.yaml").write_text(yaml.safe_dump({**run, "contents": {**run["contents"], "model": "x"}}))
    assert "another model (was x, is" in refused(capsys, file, "--out", "a", "--resume")
    (tmp_path / "a" / "run.yaml").write_text(yaml.safe_dump({**run, "contents": {**run["contents"], "data": "y"}}))
    assert "another data (was y, is" in refused(capsys, file, "--out", "a", "--resume")


@pytest.fixture
def loss_elsewhere(tmp_path, file, monkeypatch):
    """A set-up whose loss lies in a module it imports; a function that edits that module."""
    edited(file, 'F.cross_entropy(logits, targets, reduction="none"), logits', "losses.own(logits, targets)")
    file.write_text("import losses\n" + file.read_text())

    def write(body):
        (tmp_path / "losses.py").write_text(f"import torch\nimport torch.nn.functional as F\n\n{body}\n")
        monkeypatch.delitem(sys.modules, "losses", raising=False)
        importlib.invalidate_caches()

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return write


OWN = 'def own(logits, targets): return F.cross_entropy(logits, targets, reduction="none"), logits'


@pytest.mark.parametrize(
    "change",
    [
        ('"none")', '"none", label_smoothing=0.5)'),
        ("(logits, targets,", "(logits, targets * 0,"),
        (', reduction="none"), logits', ', reduction="none")'),  # another set of columns
    ],
)
@pytest.mark.parametrize("batch_size", ["7", "64"])
def test_resume_with_another_loss_in_an_imported_module_is_refused(
    tmp_path, file, loss_elsewhere, change, batch_size, monkeypatch, capsys
):
    loss_elsewhere(OWN)
    stop_after(monkeypatch, file, 5, "--batch-size", "4", "--save-every", "0")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("a/**/*") if path.is_file()}
    loss_elsewhere(OWN.replace(*change))
    line = refused_at_the_end(capsys, file, "--out", "a", "--resume", "--batch-size", batch_size)
    assert "cannot resume a: scored again, sample" in line
    assert "another --out" in line
    assert "--overwrite" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("a/**/*") if path.is_file()} == kept
    loss_elsewhere(OWN)
    assert main(["score", str(file), "--out", "a", "--resume", "--batch-size", batch_size]) == 0


def test_resume_of_random_losses_goes_on(file, loss_elsewhere, monkeypatch, capsys):
    loss_elsewhere(OWN.replace('"none")', '"none") * torch.rand(len(logits))'))
    stop_after(monkeypatch, file, 5, "--batch-size", "4", "--save-every", "0")
    assert main(["score", str(file), "--out", "a", "--resume"]) == 0
    assert "scoring the same samples twice gave two values" in capsys.readouterr().err


def stop_after(monkeypatch, file, batches, *arguments):
    """Leave a run in the directory a that was interrupted after a few batches."""

    def first_batches(*given, **options):
        yield from islice(score_batches(*given, **options), batches)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("samplewise.cli.score.score_batches", first_batches)
        assert main(["score", str(file), "--out", "a", *arguments]) == 130


def renamed(shards):
    shards[2].rename(shards[2].with_name("000000000008-000000000041.parquet"))


def cut(shards):
    shards[2].write_bytes(shards[2].read_bytes()[:100])


def emptied(shards):
    shards[2].write_bytes(b"")


def removed(shards):
    shards[2].unlink()


@pytest.mark.parametrize("damage", [renamed, cut, emptied, removed])
def test_samples_of_damaged_shards_are_scored_again(tmp_path, file, damage, capsys):
    main(["score", str(file), "--out", "whole"])
    start(file, "--batch-size", "4", "--save-every", "0")
    damage(sorted(tmp_path.glob("a/.partial/*.parquet")))
    capsys.readouterr()
    assert main(["score", str(file), "--out", "a", "--resume"]) == 0
    assert "their samples are scored again" in capsys.readouterr().err
    assert facts(tmp_path / "a")["resumed_at_sample"] == 8
    assert_same_scores(columns(tmp_path / "a"), columns(tmp_path / "whole"))


def test_shards_that_change_during_the_run_are_noticed(tmp_path, file, monkeypatch, capsys):
    start(file, "--batch-size", "4", "--save-every", "0")
    monkeypatch.setattr("samplewise.cli.score.RunDirectory.drop_damaged", lambda directory: 0)
    removed(sorted(tmp_path.glob("a/.partial/*.parquet")))
    main(["score", str(file), "--out", "a", "--resume"])
    assert "does not hold every sample exactly once" in capsys.readouterr().err


def test_resume_without_the_shards_scores_all(tmp_path, file):
    start(file)
    shutil.rmtree(tmp_path / "a" / ".partial")
    assert main(["score", str(file), "--out", "a", "--resume"]) == 0
    assert columns(tmp_path / "a")["index"] == list(range(40))


def test_a_finished_run_whose_files_are_damaged(tmp_path, file, capsys):
    main(["score", str(file), "--out", "a"])
    (tmp_path / "a" / "scores.parquet").write_bytes(b"")
    capsys.readouterr()
    assert "a/scores.parquet is gone, damaged or not of samplewise" in refused_at_the_end(
        capsys, file, "--out", "a", "--resume"
    )
    (tmp_path / "a" / "run.yaml").write_bytes(b"\xff\xfe\xff")
    assert "not of a run that can go on" in refused(capsys, file, "--out", "a", "--resume")


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((tmp_path / "a.txt").exists()))
    write_text(tmp_path / "a.txt", "text")
    assert synced == [False]


def test_a_full_disk_leaves_no_half_file_and_the_run_goes_on_later(tmp_path, file, monkeypatch, capsys):
    def full(table, path, **options):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pyarrow.parquet.write_table", full)
        assert "No space left on device" in refused_at_the_end(capsys, file, "--out", "a")
    assert not list(tmp_path.rglob("?*.partial"))
    assert main(["score", str(file), "--out", "a", "--resume"]) == 0


def test_two_runs_do_not_write_to_one_directory(tmp_path, file, capsys):
    edited(file, "def setup():", "from samplewise.cli.main import main\ndef setup():\n    inner = main(INNER)")
    file.write_text(f"INNER = ['score', {str(file)!r}, '--out', 'a', '--overwrite']\n" + file.read_text())
    assert main(["score", str(file), "--out", "a"]) == 0
    assert "a is being written by another run of samplewise" in capsys.readouterr().err


Item = make_dataclass("Item", ["label"])


@pytest.mark.parametrize(
    "item",
    [
        np.int64,
        lambda value: np.bool_(value - 1),
        complex,
        lambda value: {value},
        lambda value: Item(torch.tensor(value)),
        lambda value: Image.new("L", (3, 3), value),
        lambda value: np.array([str(value), None], dtype=object),
        lambda value: (torch.eye(3) * value).to_sparse(),
        lambda value: (torch.eye(3) * value).to_sparse_csr(),
        lambda value: torch.nested.nested_tensor([torch.ones(2), torch.ones(3) * value], layout=torch.jagged),
        lambda value: torch.tensor([1j * value]).conj(),
    ],
)
def test_the_fingerprint_takes_values_of_every_kind(item):
    def digest(value):
        return data_digest(SimpleNamespace(dataset=[item(value)]), [0])

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_random_weights_of_the_module_are_the_same_on_resume(file, capsys):
    edited(file, "def setup():", "MODEL = network()\n\ndef setup():")
    file.write_text(file.read_text().replace("ScoreTask(network()", "ScoreTask(MODEL"))
    start(file)
    assert main(["score", str(file), "--out", "a", "--resume"]) == 0, capsys.readouterr().err


def test_random_data_is_pointed_out(file, capsys):
    edited(file, "return TensorDataset(inputs,", "return Noisy(inputs,")
    noisy = """
from random import random
class Noisy(TensorDataset):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + random(), y
"""
    file.write_text(file.read_text().replace("SAMPLES = 40", f"SAMPLES = 40\n{noisy}"))
    random.seed(0)
    assert main(["score", str(file), "--out", "a"]) == 0
    assert "reading the same item twice gave two values" in capsys.readouterr().err


# bad input


def test_a_directory_that_holds_a_run(file, tmp_path, capsys):
    main(["score", str(file), "--out", "a"])
    capsys.readouterr()
    assert "a already holds run.yaml, scores.parquet, report.html" in refused(capsys, file, "--out", "a")
    assert main(["score", str(file), "--out", "a", "--overwrite", "--limit", "5"]) == 0
    assert len(columns(tmp_path / "a")["index"]) == 5


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import os, time", "import absent"),
        ("return ScoreTask", "ScoreTask"),
        ("model(inputs)", "model(input)"),
        ('"none"', '"mean"'),
    ],
)
def test_overwriting_with_a_task_that_cannot_be_scored_drops_nothing(tmp_path, file, old, new, capsys):
    main(["score", str(file), "--out", "a"])
    start(file, out="b")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("[ab]/**/*") if path.is_file()}
    edited(file, old, new)
    capsys.readouterr()
    for directory in "ab":
        refused(capsys, file, "--out", directory, "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.rglob("[ab]/**/*") if path.is_file()} == kept


def test_the_example_that_overwrites_trains_its_own_model(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr("samplewise.cli.score.render", interrupted)
        assert main(["score", "--epochs", "0", "--out", "a"]) == 130
    assert "--checkpoint needs a target" in refused_at_the_end(capsys, "--checkpoint", __file__, "--out", "a", "--overwrite")
    assert len(list(tmp_path.glob("a/.partial/*"))) > 1
    assert main(["score", "--epochs", "1", "--out", "a", "--overwrite"]) == 0
    assert "training: " in capsys.readouterr().err


def test_foreign_files_are_left_alone(tmp_path, file, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_text("mine")
    assert main(["score", str(file), "--out", "a"]) == 0
    assert main(["score", str(file), "--out", "a", "--overwrite"]) == 0
    assert (tmp_path / "a" / "model.safetensors").read_text() == "mine"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.yaml").write_text("something: else")
    capsys.readouterr()
    assert "b holds run.yaml, but not of a run that can go on" in refused(capsys, file, "--out", "b", "--resume")
    assert "b already holds run.yaml" in refused(capsys, file, "--out", "b")
    assert main(["score", str(file), "--out", "b", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gone.py:setup", "there is no file gone.py"),
        ("mine.py:other", "mine.py has no function other()"),
        ("mine.py:SAMPLES", "mine.py has no function SAMPLES()"),
        ("mine", "expected FILE.py:FUNCTION"),
        ("mine.py:", "expected FILE.py:FUNCTION"),
    ],
)
def test_targets_that_cannot_be_found(file, target, message, capsys):
    assert message in refused(capsys, target)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return ScoreTask", "ScoreTask", "got None (is a return statement missing?)"),
        ("SAMPLES = 40", "SAMPLES = 0", "the data set is empty"),
        ("SAMPLES = 40", "SAMPLES = 40 +", "cannot be imported: {file}:9: SyntaxError"),
        (
            "import os, time",
            "import absent",
            "cannot be imported: {file}:2: ModuleNotFoundError: No module named 'absent'",
        ),
        ("import os, time", "raise SystemExit(1)", "cannot be imported: {file}:2: SystemExit: 1"),
        ("def setup():", "def setup():\n    open('gone.csv')", "setup() failed: {file}:26: FileNotFoundError"),
        ("def setup():", "def setup(x):", "setup() failed: TypeError: setup() missing 1 required positional argument"),
        ("    logits =", "    {}['x']\n    logits =", "scoring failed: {file}:14: KeyError: 'x'"),
        ("model(inputs)", "model(inputs.float())", "scoring failed: {file}:14: RuntimeError: mat1 and mat2"),
        ('"none"', '"mean"', "returned a scalar for 40 samples"),
        ('"none")', '"none")[1:]', "returned shape (39,) for 40 samples"),
        (
            '"none")',
            '"none") / (inputs[:, 0, 0, 0] != data()[5][0][0, 0, 0])',
            "losses must be finite, not so for sample 5",
        ),
        ("nn.Tanh()", "Mixing()", "batch_norm"),
        ("arange(SAMPLES)", "arange(SAMPLES + 1)", "setup() failed: {file}:20: AssertionError: Size mismatch"),
    ],
)
def test_tasks_that_cannot_be_scored(file, old, new, message, capsys):
    mixing = "\nclass Mixing(nn.BatchNorm1d):\n    def __init__(self): super().__init__(4, track_running_stats=False)\n"
    assert old in SETUP
    file.write_text(SETUP.replace(old, new) + mixing)
    assert message.format(file=file) in refused(capsys, file, "--save-every", "1000")


def test_an_error_in_a_data_worker_names_the_users_line(file, capsys):
    edited(file, "return TensorDataset(inputs", "return Broken(inputs")
    broken = """
class Broken(TensorDataset):
    def __getitem__(self, i):
        if i == 7:
            raise ValueError("bad file")
        return super().__getitem__(i)
"""
    file.write_text(file.read_text() + broken)
    line = refused(capsys, file, "--num-workers", "1", "--batch-size", "8")
    assert f"{file}:31: ValueError: bad file" in line


def test_directories_that_cannot_be_written(tmp_path, file, capsys):
    (tmp_path / "plain").write_text("a file")
    assert "cannot write to the directory plain" in refused(capsys, file, "--out", "plain")
    assert "cannot write to the directory plain/a" in refused(capsys, file, "--out", "plain/a")


@pytest.mark.parametrize("package", ["pyarrow", "rich", "jinja2"])
def test_missing_extras(file, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"missing package {package}: pip install 'samplewise[cli]'" in refused(capsys, file)


def test_devices_that_are_not_there(file, capsys):
    assert "--device abacus: " in refused(capsys, file, "--device", "abacus")


def test_a_checkpoint_needs_a_target(capsys):
    assert "--checkpoint needs a target" in refused(capsys, "--checkpoint", __file__)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "0"],
        ["--limit", "x"],
        ["--resume", "--overwrite"],
        ["--top", "-1"],
        ["--seed", str(2**64)],
        ["--groups", ""],
        ["--groups", ","],
    ],
)
def test_arguments_that_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["score", *arguments])
    assert stopped.value.code == 2


def test_debug_shows_the_traceback(file):
    edited(file, '"none"', '"mean"')
    with pytest.raises(RuntimeError, match="scalar"):
        main(["score", str(file), "--debug"])


# start-up


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from samplewise.cli.main import main\n"
        "try: main(['score', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'matplotlib', 'rich', 'jinja2', 'yaml', 'sklearn'}\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "FILE.py:FUNCTION" in run.stdout
