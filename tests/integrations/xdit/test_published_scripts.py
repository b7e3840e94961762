"""The installed xDiT runner, and xDiT's own example scripts, as they are: tiny weights, two CPU ranks, compressed.

The scripts are not part of the wheel. `XDIT_EXAMPLES=FOLDER` names a folder that holds them; docs/xdit.md says where
to get it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if any(importlib.util.find_spec(name) is None for name in ("xfuser", "triton", "yunchang")):
    pytest.skip("xfuser is not installed", allow_module_level=True)

from compactdist_harness import tiny

pytestmark = [pytest.mark.xdit, pytest.mark.timeout(400)]

STEPS, LAYERS = 3, 4
CALL = ["--prompt", "cat", "--num_inference_steps", str(STEPS), "--seed", "1"]
PICTURE = ["--height", "128", "--width", "128"]
VIDEO = ["--height", "64", "--width", "64", "--num_frames", "9"]
RING = ["--ring_degree", "2", "--attention_backend", "SDPA_FLASH"]
# Script -> checkpoint, size, and forwards of the transformer: a request is run twice, CogVideoX's first with one step.
EXAMPLES = {
    "flux": ("flux", PICTURE, 2 * STEPS),
    "pixartalpha": ("pixart", [*PICTURE, "--no_use_resolution_binning"], 2 * STEPS),
    "pixartsigma": ("pixart", [*PICTURE, "--no_use_resolution_binning"], 2 * STEPS),
    "sd3": ("sd3", PICTURE, 2 * STEPS),
    "cogvideox": ("cogvideox", VIDEO, 1 + STEPS),
}


def launch(folder: Path, words: list[str], codec: str | None) -> str:
    """Run `words` on two ranks in `folder`; what they say on stderr, with a table for each rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "compactdist_harness.cpu"]
    if codec is not None:
        command += ["-m", "compactdist_xdit"]
        words = [*words, "--compact_codec", codec, "--compact_explain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *words], cwd=folder, env=environment, timeout=180, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stderr


def picture(folder: Path) -> np.ndarray:
    """The only picture in a folder, `(height, width, 3)`, 0 to 1."""
    from PIL import Image

    (file,) = folder.glob("*.png")
    return np.asarray(Image.open(file)).astype(float) / 255


def error(drawn: np.ndarray, reference: np.ndarray) -> float:
    """Relative to how much the reference varies, for pictures have a mean that no error touches."""
    return float(np.linalg.norm(drawn - reference) / np.linalg.norm(reference - reference.mean()))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the name of FLUX.1 on the hub is that of a local checkpoint."""
    folder = tmp_path_factory.mktemp("runner")
    tiny.save("flux", folder / "black-forest-labs" / "FLUX.1-dev")
    return folder


def run_runner(home: Path, codec: str | None) -> tuple[np.ndarray, str]:
    out = str(codec)
    (home / out).mkdir()
    words = ["-m", "xfuser.runner", "--model", "FLUX.1-dev", *CALL, *PICTURE, *RING]
    words += ["--max_sequence_length", "64", "--warmup_calls", "0", "--output_directory", out]
    shown = launch(home, words, codec)
    return picture(home / out), shown


@pytest.mark.slow
def test_runner_compressed(home: Path) -> None:
    uncompressed, _ = run_runner(home, None)
    assert uncompressed.shape == (128, 128, 3)
    assert uncompressed.std() > 0.05, "a picture on which errors would not be seen"
    drawn, shown = run_runner(home, "int4")
    assert shown.count(f"total: {STEPS * LAYERS} compressed and 0 passed-through calls") == 2, shown[-3000:]
    assert 0 < error(drawn, uncompressed) < 4e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    folder = os.environ.get("XDIT_EXAMPLES")
    if folder is None:
        pytest.skip("XDIT_EXAMPLES names no folder with xDiT's example scripts (docs/xdit.md)")
    script = Path(folder).resolve() / f"{name}_example.py"
    if not script.exists():
        pytest.skip(f"{script} does not exist")
    if name == "cogvideox" and all(importlib.util.find_spec(writer) is None for writer in ("imageio", "cv2")):
        pytest.skip("cogvideox_example.py writes its video with imageio or opencv, of which neither is installed")
    model, size, forwards = EXAMPLES[name]
    checkpoint = tmp_path / "checkpoint"
    tiny.save(model, checkpoint)
    drawn = []
    for codec in (None, "int4"):
        place = tmp_path / str(codec)
        (place / "results").mkdir(parents=True)  # not every script makes it
        shown = launch(place, [str(script), "--model", str(checkpoint), *CALL, *size, *RING], codec)
        if codec is not None:
            calls = forwards * LAYERS
            assert shown.count(f"total: {calls} compressed and 0 passed-through calls") == 2, shown[-3000:]
        if size is VIDEO:
            assert len(list((place / "results").glob("*.mp4"))) == 1
        else:
            drawn.append(picture(place / "results"))
    if drawn:
        assert drawn[0].std() > 0.05
        assert 0 < error(drawn[1], drawn[0]) < 4e-2
