import struct

from poolbench.machine import idle


def virtual(tmp_path, monkeypatch, flags="fpu hypervisor lahf_lm"):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(idle, "is_virtual", lambda read=idle.is_virtual: read(info))
    requests = tmp_path / "requests"
    requests.touch()
    return requests


def test_keep_awake_holds_its_request_until_let_sleep(tmp_path, monkeypatch):
    requests = virtual(tmp_path, monkeypatch)
    idle.let_sleep()
    assert idle.keep_awake(requests)
    assert struct.unpack("i", requests.read_bytes()) == (0,)
    assert len(idle._held) == 1
    assert idle.keep_awake(requests)  # once is enough
    assert len(idle._held) == 1
    idle.let_sleep()
    assert not idle._held


def test_keep_awake_physical_machine_makes_no_request(tmp_path, monkeypatch):
    requests = virtual(tmp_path, monkeypatch, flags="fpu lahf_lm")
    assert not idle.keep_awake(requests)
    assert requests.read_bytes() == b""


def test_keep_awake_forbidden_request_is_no_error(tmp_path, monkeypatch):
    virtual(tmp_path, monkeypatch)
    assert not idle.keep_awake(tmp_path / "not-there" / "requests")
    assert not idle._held
