from reltrace_worker.session.leases import Window


def test_a_worker_offers_what_it_has_not_offered_before() -> None:
    window = Window()
    assert window.offer(held=0) == 256
    window.leased(100)
    assert window.offer(held=100) == 0
    assert window.offer(held=40) == 60


def test_a_new_connection_knows_of_no_offer() -> None:
    window = Window()
    window.offer(held=0)
    window.connected()
    assert window.offer(held=10) == 246


def test_long_prompts_make_a_small_window() -> None:
    """
    Given 256 leases of which a pass takes eight
    I expect three passes' worth from then on, and nothing offered until so few are held.
    """
    window = Window()
    window.leased(window.offer(held=0))
    window.passed(8)
    assert window.offer(held=248) == 0
    assert window.offer(held=20) == 4


def test_a_window_is_never_too_small_to_fill_a_pass_of_short_prompts() -> None:
    window = Window()
    window.passed(1)
    assert window.size == 16


def test_a_pass_that_takes_everything_lets_the_window_grow() -> None:
    window = Window()
    window.passed(1)
    for size in (32, 64, 128, 256, 256):
        window.passed(0)
        assert window.size == size
