import hashlib

import yaml

from loraseg.cli import main
from loraseg.serving.tokens import TokenStore


def test_printed_entry_belongs_to_the_printed_token(capsys, tmp_path):
    options = ["--roles", "segment,admin", "--adapters", "night*, rain", "--concurrent", "3"]
    assert main(["token", "new", "--name", "night-team", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    token = lines[1]
    entries = yaml.safe_load("\n".join(lines[3:]))
    assert entries[0]["sha256"] == hashlib.sha256(token.encode()).hexdigest()
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump({"tokens": entries}))
    found = TokenStore.open(str(tmp_path / "tokens.yaml")).authenticate(token)
    assert found.roles == ("segment", "admin")
    assert found.adapters == ("night*", "rain")
    assert found.concurrent == 3


def test_every_token_is_another(capsys):
    for _ in range(2):
        main(["token", "new", "--name", "a"])
    lines = capsys.readouterr().out.splitlines()
    assert len({line for line in lines if len(line) == 43}) == 2


def test_wrong_role_is_the_users_mistake(capsys):
    assert main(["token", "new", "--name", "a", "--roles", "root"]) == 2
    assert "roles" in capsys.readouterr().err
