"""What Redis holds does not grow with what was done."""

from collections.abc import Callable

from chaos.cluster import Cluster
from chaos.memory import MARGIN, SCRIPTS, measure

Start = Callable[..., Cluster]


def test_redis_is_as_full_after_thousands_of_jobs_as_after_a_hundred(start: Start) -> None:
    """
    Given tiny jobs, submitted, read and acknowledged, a hundred at a time
    If thousands of them have gone through
    I expect as many keys as after the first hundreds, no more bytes in them, no script but ours.
    """
    figures = measure(start(schedulers=1), jobs=4000)
    assert figures.after.keys == figures.before.keys
    assert figures.after.scripts <= SCRIPTS
    assert figures.growth < MARGIN
