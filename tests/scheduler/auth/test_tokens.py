import hashlib
import math
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from damage import damaged_toml, damages, told
from hypothesis import given
from hypothesis import strategies as st
from reltrace_scheduler.auth.identity import TENANT_NAME, Role
from reltrace_scheduler.auth.tokens import Entry, TokenError, Tokens, append, in_time, make, parse
from reltrace_scheduler.errors import StartError, UnauthenticatedError
from structlog.testing import capture_logs

HASH = "0" * 64


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def add(file: Path, name: str, role: Role = Role.CLIENT, tenant: str = "default") -> str:
    token, entry = make(name, role, tenant)
    append(file, entry)
    return token


def test_a_token_is_found_by_its_hash_and_is_not_in_the_file(file: Path) -> None:
    alice = add(file, "alice", Role.CLIENT, "team-a")
    worker = add(file, "w1", Role.WORKER)
    root = add(file, "root", Role.OPERATOR, "ops")
    tokens = Tokens(file)

    found = tokens.find(alice)
    assert (found.name, found.tenant, found.role) == ("alice", "team-a", Role.CLIENT)
    assert tokens.find(worker).role is Role.WORKER
    assert tokens.find(root).role is Role.OPERATOR

    content = file.read_text()
    assert not any(token in content for token in (alice, worker, root))
    assert hashlib.sha256(alice.encode()).hexdigest() in content
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_token_has_256_random_bits() -> None:
    made = {make("a", Role.CLIENT)[0] for _ in range(1000)}
    assert len(made) == 1000
    # base64 carries six bits a character.
    assert {math.floor(len(token.removeprefix("rlt_")) * 6 / 8) for token in made} == {32}


@pytest.mark.parametrize("wrong", ["", "rlt_", "x" * 47, "rlt_" + "A" * 43])
def test_a_token_that_nobody_has(file: Path, wrong: str) -> None:
    add(file, "alice")
    with pytest.raises(UnauthenticatedError, match="not known here"):
        Tokens(file).find(wrong)


@given(
    st.from_regex(TENANT_NAME, fullmatch=True),
    st.sampled_from(Role),
    st.from_regex(TENANT_NAME, fullmatch=True),
    st.none() | st.datetimes(timezones=st.just(UTC)),
)
def test_what_is_written_is_what_is_read(
    name: str, role: Role, tenant: str, expires: datetime | None
) -> None:
    _, entry = make(name, role, "default" if role is Role.WORKER else tenant, expires)
    assert parse(entry.to_toml()) == (entry,)


def test_a_token_that_expires(file: Path) -> None:
    soon, entry = make("soon", Role.CLIENT, expires=in_time("1h"))
    append(file, entry)
    late, entry = make("late", Role.CLIENT, expires=datetime.now(UTC) - timedelta(seconds=1))
    append(file, entry)
    tokens = Tokens(file)
    assert tokens.find(soon).name == "soon"
    said = r"the token 'late' expired at 20\d\d-.*: ask the operator for a new one"
    with pytest.raises(UnauthenticatedError, match=said):
        tokens.find(late)


@pytest.mark.parametrize(("text", "hours"), [("30d", 720), ("12h", 12), ("99999d", 2399976)])
def test_times_until_a_token_expires(text: str, hours: int) -> None:
    left = in_time(text) - datetime.now(UTC)
    assert timedelta(hours=hours, seconds=-2) < left <= timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "0d", "-1d", "30", "1.5d", "999999d", "1w", "\u0661d"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(TokenError, match=re.escape(f"--expires {text}: must be days or hours")):
        in_time(text)


@pytest.mark.parametrize("name", [".", ".."])
def test_no_tenant_has_the_name_of_another_folder(name: str) -> None:
    with pytest.raises(TokenError, match=r"and not \. or \.\."):
        make("a", Role.CLIENT, name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[token]", "is not TOML"),
        ("token = 3", "must be"),
        ("other = 3", "'other': only"),
        (f'[[token]]\nname="a"\nrole="king"\nsha256="{HASH}"', "role 'king': must be one of"),
        (f'[[token]]\nname="a b"\nrole="client"\nsha256="{HASH}"', "name 'a b': must be 1 to 64"),
        (f'[[token]]\nname="a"\nrole="client"\ntenant=""\nsha256="{HASH}"', "tenant ''"),
        (f'[[token]]\nname="a"\nrole="worker"\ntenant="t"\nsha256="{HASH}"', "every tenant"),
        ('[[token]]\nname="a"\nrole="client"\nsha256="abc"', "sha256: must be 64"),
        ('[[token]]\nname="a"\nrole="client"', "sha256: must be a string"),
        ('[[token]]\nname=3\nrole="client"', "name: must be a string"),
        (f'[[token]]\nname="a"\nrole="client"\nsha256="{HASH}"\nx=1', "'x' is none of"),
        (
            f'[[token]]\nname="a"\nrole="client"\nsha256="{HASH}"\nexpires="2030-01-01"',
            "expires: must be a time",
        ),
        (
            f'[[token]]\nname="a"\nrole="client"\nsha256="{HASH}"\nexpires=2030-01-01T00:00:00',
            "expires: must have a time zone",
        ),
        (f'[[token]]\nname="a"\nrole="client"\nsha256="{HASH}"\n' * 2, "'a' is there twice"),
    ],
)
def test_a_broken_file_says_where(text: str, said: str, file: Path) -> None:
    with pytest.raises(TokenError, match=said):
        parse(text)
    file.write_text(text)
    with pytest.raises(StartError, match=f"--tokens {file}"):
        Tokens(file)


def test_a_file_without_tokens_lets_nobody_in_and_is_refused(file: Path) -> None:
    file.write_text("# none yet\n")
    with pytest.raises(StartError, match="holds no token"):
        Tokens(file)
    with pytest.raises(StartError, match="No such file"):
        Tokens(file.with_name("missing"))


def test_two_tokens_of_one_name_are_refused_and_the_file_stays(file: Path) -> None:
    add(file, "alice")
    before = file.read_text()
    with pytest.raises(TokenError, match="'alice' is in"):
        add(file, "alice")
    assert file.read_text() == before


def test_an_entry_follows_a_file_without_a_last_newline(file: Path) -> None:
    file.write_text("# by hand")
    token = add(file, "alice")
    assert Tokens(file).find(token).name == "alice"


def test_a_change_of_the_file_is_seen_at_most_a_second_later(file: Path) -> None:
    clock = Clock()
    alice = add(file, "alice")
    tokens = Tokens(file, clock)
    bob = add(file, "bob")
    clock.now += 0.9
    with pytest.raises(UnauthenticatedError):
        tokens.find(bob)
    clock.now += 0.2
    assert tokens.find(bob).name == "bob"

    # alice is withdrawn.
    entries = parse(file.read_text())
    file.write_text("\n".join(e.to_toml() for e in entries if e.name == "bob"))
    clock.now += 1.1
    with pytest.raises(UnauthenticatedError):
        tokens.find(alice)
    assert tokens.find(bob).name == "bob"


@pytest.mark.parametrize("broken", ["[[token", None, b"\xff\xfe", "x" * (4 << 20) + "x"])
def test_a_broken_new_file_keeps_the_old_tokens(file: Path, broken: str | bytes | None) -> None:
    clock = Clock()
    alice = add(file, "alice")
    tokens = Tokens(file, clock)
    good = file.read_text()
    if broken is None:
        file.unlink()
    else:
        file.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    with capture_logs() as logs:
        for _ in range(3):
            clock.now += 1.1
            assert tokens.find(alice).name == "alice"
    assert logs[0]["event"] == "tokens.unreadable"
    # Once, until the file changes again.
    assert len(logs) == 1

    # A repaired file holds, also one that looks as it did before.
    file.write_text(good)
    os.utime(file, ns=(1, 1))
    bob = add(file, "bob")
    clock.now += 1.1
    assert tokens.find(bob).name == "bob"


def test_entries_show_no_more_than_the_file() -> None:
    token, entry = make("alice", Role.CLIENT)
    assert token not in repr(entry)
    assert isinstance(entry, Entry)


@damages
@given(content=damaged_toml("".join(make(name, Role.CLIENT)[1].to_toml() for name in "ab")))
def test_a_damaged_file_is_tokens_or_an_error_that_names_it(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with told(StartError, str(file)):
        assert Tokens(file)
