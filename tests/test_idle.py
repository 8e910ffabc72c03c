import struct

from poolbench.machine import idle


def virtual(tmp_path, monkeypatch, flags="fpu hypervisor lahf_lm"):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(idle, "is_virtual", lambda read=idle.is_virtual: read(info))
    requests = tmp_path / "requests"
    requests.touch()
    return requests


def test_disable_idle_states_holds_its_request_until_enable_idle_states(tmp_path, monkeypatch):
    requests = virtual(tmp_path, monkeypatch)
    idle.enable_idle_states()
    assert idle.disable_idle_states(requests)
    assert struct.unpack("i", requests.read_bytes()) == (0,)
    assert len(idle._held) == 1
    assert idle.disable_idle_states(requests)  # once is enough
    assert len(idle._held) == 1
    idle.enable_idle_states()
    assert not idle._held


def test_is_virtual_whatever_the_place_of_the_flag(tmp_path):
    info = tmp_path / "cpuinfo"
    for flags, virtual_one in (("hypervisor fpu", True), ("fpu hypervisor", True), ("fpu", False)):
        info.write_text(f"flags : {flags}\n")
        assert idle.is_virtual(info) == virtual_one


def test_disable_idle_states_physical_machine_makes_no_request(tmp_path, monkeypatch):
    requests = virtual(tmp_path, monkeypatch, flags="fpu lahf_lm")
    assert not idle.disable_idle_states(requests)
    assert requests.read_bytes() == b""


def test_disable_idle_states_forbidden_request_is_no_error(tmp_path, monkeypatch):
    virtual(tmp_path, monkeypatch)
    assert not idle.disable_idle_states(tmp_path / "not-there" / "requests")
    assert not idle._held
