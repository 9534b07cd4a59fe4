"""Switches of the process, held by several threads."""

import threading

import pytest

from ewc._switches import Switch, _switches
from ewc.fisher.environment import Environment
from tests.support.threads import at_once


@pytest.fixture
def setting():
    """The history of a setting, whose last entry is its value."""
    return ["off"]


@pytest.fixture
def switch(setting):
    switch = Switch(lambda: setting[-1], lambda: setting.append("on"), setting.append)
    yield switch
    _switches.remove(switch)


def test_it_is_put_back_by_the_last_context(setting, switch):
    with switch:
        with switch:
            assert setting[-1] == "on"
        assert setting[-1] == "on"
    assert setting[-1] == "off"


def test_threads_whose_contexts_overlap(setting, switch):
    """A enters, B enters, A leaves, B leaves."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with switch:
            first_in.set()
            assert second_in.wait(10)
        assert switch.holds == 0
        first_out.set()

    def second():
        assert first_in.wait(10)
        with switch:
            second_in.set()
            assert first_out.wait(10)
            assert (switch.holds, setting[-1]) == (1, "on")

    at_once(first, second)
    assert (setting[-1], switch.is_changed) == ("off", False)


def test_many_threads(setting, switch):
    def enter_often():
        for _ in range(200):
            with switch:
                assert setting[-1] == "on"

    at_once(*[enter_often] * 4)
    assert setting[-1] == "off"


@pytest.mark.parametrize("inside", [False, True])
def test_an_environment_leaves_what_an_interrupt_has_left_entered(setting, switch, inside):
    def interrupted():
        environment = Environment()
        switch.__enter__()
        switch.__enter__()
        environment.restore()
        environment.restore()

    if inside:
        with switch:
            interrupted()
            assert setting[-1] == "on"
    else:
        interrupted()
    assert (setting[-1], switch.is_changed) == ("off", False)


def test_an_interrupt_while_it_changes(setting):
    def change():
        setting.append("on")
        raise KeyboardInterrupt

    switch = Switch(lambda: setting[-1], change, setting.append)
    environment = Environment()
    with pytest.raises(KeyboardInterrupt), switch:
        pass
    environment.restore()
    assert setting[-1] == "off"
    assert at_once(lambda: switch.keep(0)) == [None]  # the lock is free
    _switches.remove(switch)
