from reltrace_worker.session.leases import LeaseWindow


def test_a_worker_offers_what_it_has_not_offered_before() -> None:
    window = LeaseWindow()
    assert window.offer(held=0) == 256
    window.add_leased(100)
    assert window.offer(held=100) == 0
    assert window.offer(held=40) == 60


def test_a_new_connection_knows_of_no_offer() -> None:
    window = LeaseWindow()
    window.offer(held=0)
    window.reset_offers()
    assert window.offer(held=10) == 246


def test_long_prompts_make_a_small_window() -> None:
    """
    Given 256 leases of which a pass takes eight
    I expect three passes' worth from then on, and nothing offered until so few are held.
    """
    window = LeaseWindow()
    window.add_leased(window.offer(held=0))
    window.adapt(8)
    assert window.offer(held=248) == 0
    assert window.offer(held=20) == 4


def test_a_window_is_never_too_small_to_fill_a_pass_of_short_prompts() -> None:
    window = LeaseWindow()
    window.adapt(1)
    assert window.size == 16


def test_a_pass_that_takes_everything_lets_the_window_grow() -> None:
    window = LeaseWindow()
    window.adapt(1)
    for size in (32, 64, 128, 256, 256):
        window.adapt(0)
        assert window.size == size
