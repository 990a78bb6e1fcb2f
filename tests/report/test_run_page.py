"""report.html of a run, from the files of its directory."""

import re
import shutil
import subprocess

import pytest

from megatron_plugin.report.environment import read_environment, write_environment
from megatron_plugin.report.lines import read_metrics
from megatron_plugin.report.run_page import NoRunError, write_run_page
from tests.report.runs import HOSTILE, metrics_file, rollouts_file

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_of_a_run(tmp_path):
    metrics_file(tmp_path, 20, **{"eval/heldout_nll": 1.5, "data/bad_lines": 3.0})
    rollouts_file(tmp_path, {"one?": [0.0, 0.25, 1.0], "two?": [0.5]}, step=20)
    (tmp_path / "config.yaml").write_text("seed: 77\n")
    write_environment(tmp_path, ranks=4)
    page = write_run_page(tmp_path).read_text()
    assert "20 steps, 10 s in them" in page and "3 lines of the data were left out" in page
    assert "<td>loss as trained</td>\n<td>3.7</td>\n<td>0.1</td>" in page, "means of the first and last two steps"
    assert "<td>heldout_nll</td>" in page and "seed: 77" in page and "<td>forward, backward, optimizer</td>\n<td>8.0</td>\n<td>80%</td>" in page
    best, worst = page.split("Best samples")[1].split("Worst samples")
    assert re.findall(r"reward ([\d.]+)<", best) == ["1", "0.5"] and re.findall(r"reward ([\d.]+)<", worst) == ["0", "0.5"], "one of each prompt"
    assert page.count("data:image/png") == 2 and read_environment(tmp_path)["ranks"] == "4" and "<td>ranks</td>" in page


def test_the_seconds_of_a_step_are_counted_once(tmp_path):
    """perf/train_s holds the three that follow; what lies between steps is no part of them."""
    more = {"perf/data_s": 0.05, "perf/forward_backward_s": 0.25, "perf/optimizer_s": 0.05, "perf/save_s": 0.2, "perf/evaluate_s": 1.0, "perf/mfu": 0.41, "perf/memory_gib": 71.5}
    metrics_file(tmp_path, 10, **more)
    page = write_run_page(tmp_path).read_text()
    rows = {heading: tuple(cells) for heading, *cells in re.findall(r"<td>(.*?)</td>\n<td>([\d.]+)</td>\n<td>(\d+%)</td>", page)}
    assert rows == {
        "packing and making batches": ("0.5", "10%"), "forward and backward": ("2.5", "50%"), "gradient norm and optimizer": ("0.5", "10%"), "the rest": ("1.5", "30%"),
        "between steps: checkpoints": ("2.0", "40%"), "between steps: evaluations": ("10.0", "200%"),
    }  # fmt: skip
    assert "<td>share of the devices' peak (MFU)</td>\n<td>0.41</td>" in page and "<td>memory of the fullest rank, GiB</td>\n<td>71.5</td>" in page


def test_samples_are_those_of_the_last_steps(tmp_path):
    metrics_file(tmp_path, 10)
    rollouts_file(tmp_path, {"early?": [1.0]}, step=8)
    rollouts_file(tmp_path, {"late?": [0.5]}, step=9)
    page = write_run_page(tmp_path).read_text()
    assert "late?" in page and "early?" not in page


def test_a_run_of_demonstrations_alone(tmp_path):
    metrics_file(tmp_path, 3)
    page = write_run_page(tmp_path).read_text()
    assert "3 steps" in page and "samples" not in page


@pytest.mark.parametrize("there", [False, True])
def test_no_run(tmp_path, there):
    if there:
        (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(NoRunError, match=r"expected a run directory with a metrics\.jsonl"):
        write_run_page(tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(tmp_path):
    """As a browser builds it: no script has run, nothing is asked of the network, pictures have their size."""
    metrics_file(tmp_path, 5)
    rollouts_file(tmp_path, {HOSTILE: [1.0]}, step=5, completion=HOSTILE)
    page = write_run_page(tmp_path)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--window-size=1200,900"]
    built = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert f"<title>{tmp_path.name}</title>" in built and "document.title='taken'" in built
    assert "example.com" in built and not re.search(r'(src|href)="(?!data:)', built)
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    import matplotlib.image

    pixels = matplotlib.image.imread(shot)
    assert pixels.shape[:2] == (900, 1200) and len({tuple(p) for p in pixels.reshape(-1, pixels.shape[-1])[::97].round(2).tolist()}) > 20, "blank"


def test_an_environment_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    write_environment(tmp_path, ranks=1)
    assert "commit" not in read_environment(tmp_path) and read_environment(tmp_path)["ranks"] == "1"


def test_a_damaged_line_of_the_metrics_costs_itself(tmp_path):
    metrics_file(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b'{"step": 2, "train/lo\xff\n' + b"\n7\n" + third + b'{"step"')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
