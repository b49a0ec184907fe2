import hashlib

import yaml

from loraseg.cli import main
from loraseg.serving.tokens import TokenStore


def test_the_printed_entry_matches_the_printed_token(capsys, tmp_path):
    options = ["--roles", "segment,admin", "--adapters", "night*, rain", "--concurrent", "3"]
    assert main(["token", "new", "--name", "night-team", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    token = lines[1]
    entries = yaml.safe_load("\n".join(lines[3:]))
    assert entries[0]["sha256"] == hashlib.sha256(token.encode()).hexdigest()
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump({"tokens": entries}))
    entry = TokenStore.open(str(tmp_path / "tokens.yaml")).authenticate(token)
    assert entry.roles == ("segment", "admin")
    assert entry.adapters == ("night*", "rain")
    assert entry.concurrent == 3


def test_tokens_differ(capsys):
    for _ in range(2):
        main(["token", "new", "--name", "a"])
    lines = capsys.readouterr().out.splitlines()
    assert len({line for line in lines if len(line) == 43}) == 2


def test_an_unknown_role_is_a_usage_error(capsys):
    assert main(["token", "new", "--name", "a", "--roles", "root"]) == 2
    assert "roles" in capsys.readouterr().err
