"""`doctor` says what there is, and that it works."""

import json
import subprocess
import sys

from processes import environment

from spear_jax import doctor
from spear_jax.core.versions import PACKAGES


def test_doctor_names_devices_versions_optional_packages_and_caches_and_runs_a_round(tmp_path):
    env = environment() | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "HF_HOME": str(tmp_path / "hub"),
    }
    (tmp_path / "hub/hub").mkdir(parents=True)
    (tmp_path / "hub/hub/file").write_bytes(b"x" * 1000)
    done = subprocess.run(
        [sys.executable, "-m", "spear_jax.doctor"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *told, last = done.stdout.splitlines()
    found = json.loads(last)
    assert set(found["versions"]) == set(PACKAGES) and set(found["optional"]) == set(
        doctor.OPTIONAL
    )
    assert found["devices"] and found["memory_free"] > 0
    assert found["caches"]["models"] == {"path": str(tmp_path / "hub/hub"), "bytes": 1000}
    assert found["caches"]["compilation"]["path"] == str(tmp_path / "programs")
    assert set(found["self_test"]) == {"build", "evaluate", "round"} and all(
        found["self_test"].values()
    )
    assert any(line.startswith("self-test") for line in told)


def test_a_machine_that_cannot_run_is_not_ready(tmp_path):
    """JAX finds no device of the platform that it is told to use."""
    env = environment() | {"HF_HOME": str(tmp_path), "JAX_PLATFORMS": "tpu"}
    done = subprocess.run(
        [sys.executable, "-m", "spear_jax.doctor"], env=env, capture_output=True, text=True
    )
    *told, last = done.stdout.splitlines()
    found = json.loads(last)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert found["self_test"] == {} and found["devices"] == []
    assert told[-1] == found["verdict"] == f"not ready: {found['failed'][0]}"
    assert found["failed"][0].startswith("self-test build: RuntimeError: Unable to initialize")


def test_an_absent_package_is_named_in_the_verdict():
    assert doctor.verdict(["package orbax is absent"]) == "not ready: package orbax is absent"
    assert doctor.verdict([]).startswith("ready on cpu")


def test_a_package_that_is_not_there_is_absent_and_not_an_error():
    assert doctor.version_of("jax")
    assert doctor.version_of("no-such-package-at-all") is None


def test_a_caches_size_counts_files_once_and_follows_no_links(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/a").write_bytes(b"x" * 10)
    (tmp_path / "link").symlink_to(tmp_path / "blobs/a")
    assert doctor.size_of(tmp_path) == 10 and doctor.size_of(tmp_path / "nothing") == 0
