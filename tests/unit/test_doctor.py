"""What doctor says of machines that lack something."""

from calibtrain import doctor


def one(findings):
    (finding,) = findings
    return finding


def test_packages_are_compared_with_their_ranges():
    found = list(doctor.packages(["pydantic>=2", "pydantic>=99", "no-such-package>=1", "absent>=1; extra == 'dev'"]))
    assert [finding.level for finding in found] == ["ok", "missing", "missing"]
    assert "pip install 'pydantic>=99'" in found[1].mend
    assert "not installed" in found[2].says


def test_cpu_without_bf16(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("flags : sse avx2\n")
    assert one(doctor.cpu(file)).level == "note"
    file.write_text("flags : sse avx512_bf16\n")
    assert one(doctor.cpu(file)).level == "ok"


def test_the_wandb_key_is_never_shown(tmp_path):
    found = one(doctor.wandb_key({"WANDB_API_KEY": "secret-key"}, tmp_path / "none"))
    assert found.level == "ok"
    assert "secret-key" not in repr(found)
    assert one(doctor.wandb_key({}, tmp_path / "none")).level == "note"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret-key\n")
    assert one(doctor.wandb_key({}, tmp_path / "netrc")).level == "ok"


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert one(doctor.compiler()).level == "missing"


def test_two_processes_that_cannot_meet(monkeypatch):
    assert one(doctor.processes()).level == "ok"
    monkeypatch.setattr(doctor, "TWO_PROCESSES", "raise SystemExit('no route')")
    found = one(doctor.processes())
    assert found.level == "missing"
    assert "no route" in found.says


def test_only_missing_things_fail(capsys):
    note = doctor.Finding("note", "gpu", "none")
    assert doctor.show([note])
    assert not doctor.show([note, doctor.Finding("missing", "torch", "not installed", "pip install torch")])
    assert "pip install torch" in capsys.readouterr().out
