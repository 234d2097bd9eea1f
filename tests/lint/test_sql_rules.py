"""Each rule of the SQL lint catches what it is for, and lets pass what is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgworker_client.installations import installations
from tests.lint import file_rules
from tests.lint.__main__ import check_parts
from tests.lint.findings import Allowances, Finding
from tests.lint.installed_rules import check_installed, find_checker
from tests.lint.sql_rules import RULES, check_beginning, check_sql
from tests.lint.statements import read_statements

GOOD = """
-- What is right, in every way that the rules look at.
create schema pgworker;
comment on schema pgworker is 'a queue';
create table pgworker.job (id bigint primary key, state text not null);
comment on table pgworker.job is 'jobs';
create view pgworker.jobs as select j.id, j.state from pgworker.job j;
comment on view pgworker.jobs is 'jobs';
create type pgworker.claimed_job as (id bigint);
comment on type pgworker.claimed_job is 'a job';

create function pgworker.one(id bigint default null, ids bigint[] default '{}') returns setof pgworker.jobs
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
  v_rows pgworker.claimed_job[];
  v_job  pgworker.job%rowtype;
begin
  with dead as (select j.id from pgworker.job j where j.state = 'failed' for update of j)
  select count(*) into v_job.id from dead;
  for i in 1 .. 2 loop
    if exists (select from pgworker.job) then
      v_job.id := (select max(j.id) from pgworker.job j);
    end if;
  end loop;
  return query select j.* from pgworker.jobs j;
end
$$;
comment on function pgworker.one(bigint, bigint[]) is 'rows';

create function pgworker.all_of_them() returns setof pgworker.jobs
language sql stable parallel safe
begin atomic
  select o.* from pgworker.one() o;
end;
comment on function pgworker.all_of_them() is 'rows';
"""


def lint(sql: str, allowed: Allowances | None = None) -> list[Finding]:
    return check_sql(read_statements(Path("sample.sql"), sql), allowed or Allowances())


def function(body: str = "begin end", options: str | None = None, language: str = "plpgsql") -> str:
    """Return a function that is right but for what the arguments bring."""
    options = "volatile parallel unsafe set search_path = pg_catalog, pg_temp" if options is None else options
    made = f"create function pgworker.f() returns void language {language} {options} as $$ {body} $$;"
    return f"{made}\ncomment on function pgworker.f() is 'f';"


BAD = {
    "search_path": [
        function(options="volatile parallel unsafe"),
        function(options="volatile parallel unsafe set search_path = pgworker, pg_temp"),
        function(options="volatile parallel unsafe set search_path = pg_catalog"),
        "create function pgworker.f() returns int language sql immutable parallel safe"
        " set search_path = pg_catalog, pg_temp return 1; comment on function pgworker.f() is 'f';",
    ],
    "stated": [
        function(options="parallel unsafe set search_path = pg_catalog, pg_temp"),
        function(options="volatile set search_path = pg_catalog, pg_temp"),
    ],
    "security_definer": [
        function(options="volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp"),
    ],
    "qualified": [
        function("begin perform 1 from job; end"),
        function("declare v_n int; begin v_n := (select count(*) from job); end"),
        function("begin if exists (select from job) then return; end if; end"),
        function("select from job", language="sql"),
        "create function pgworker.f() returns int language sql stable parallel safe return (select 1 from job);"
        " comment on function pgworker.f() is 'f';",
        "create index job_state on job (state);",
        "insert into setting values (1);",
    ],
    "star": [
        function("begin perform * from pgworker.job; end"),
        function("begin perform j.* from pgworker.job j join pgworker.jobs s on true; end"),
        function("declare v_j record; begin delete from pgworker.job returning * into v_j; end"),
        "create view pgworker.v as select * from pgworker.job; comment on view pgworker.v is 'v';",
    ],
    "dynamic_sql": [
        function("begin execute 'select ' || 1; end"),
        function("declare v_r record; begin for v_r in execute 'select 1' loop end loop; end"),
        function("begin return query execute 'select 1'; end").replace("returns void", "returns setof int"),
    ],
    "exception_block": [
        function("begin perform 1; exception when others then null; end"),
        function("begin begin perform 1; exception when data_exception then null; end; end"),
    ],
    "variable_names": [
        function("declare total int; begin end"),
        function("declare row record; begin end"),
        function("begin for number in 1 .. 2 loop end loop; end"),
    ],
    "literal_state": [
        function("declare v_state text; begin perform 1 from pgworker.jobs j where j.state = v_state; end"),
        function("declare v_s text[]; begin update pgworker.job j set id = 1 where j.state = any (v_s); end"),
    ],
    "commented": [
        "create schema s;",
        "create table pgworker.t (); comment on table pgworker.u is 'another';",
        "create view pgworker.v as select 1 as one;",
        "create sequence pgworker.s;",
        "create type pgworker.y as (a int);",
        "create function pgworker.g(text, int) returns int language sql immutable parallel safe return 1;"
        " comment on function pgworker.g(text) is 'another';",
    ],
}


def test_what_is_right_passes() -> None:
    assert lint(GOOD) == []


@pytest.mark.parametrize(("rule", "sample"), [(rule, sample) for rule, samples in BAD.items() for sample in samples])
def test_each_rule_catches_its_bad_sample(rule: str, sample: str) -> None:
    assert {finding.rule for finding in lint(sample)} == {rule}


def test_every_rule_has_a_bad_sample() -> None:
    assert BAD.keys() == RULES.keys()


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("set local search_path = pg_catalog, pg_temp; create schema pgworker;", []),
        ("create schema pgworker; set local search_path = pg_catalog, pg_temp;", ["beginning"]),
        ("set search_path = pg_catalog, pg_temp;", ["beginning"]),
        ("set local search_path = pg_catalog;", ["beginning"]),
    ],
)
def test_the_script_begins_by_pinning_its_search_path(sql: str, found: list[str]) -> None:
    assert [finding.rule for finding in check_beginning(read_statements(Path("sample.sql"), sql))] == found


def test_a_finding_names_the_line() -> None:
    sql = GOOD + "\n-- A comment\n-- before it\n" + function("\nbegin\n  perform 1 from job;\nend")
    (finding,) = lint(sql)
    assert sql.splitlines()[finding.line - 1] == "  perform 1 from job;"
    assert str(finding) == f"sample.sql:{finding.line}: qualified: f: relation job without its schema"


def test_a_body_that_does_not_parse_is_a_finding() -> None:
    assert [finding.rule for finding in lint(function("begin if; end"))] == ["parse"]


@pytest.mark.parametrize("rule", ["security_definer", "dynamic_sql", "exception_block", "literal_state", "star"])
def test_a_listed_function_may(rule: str) -> None:
    assert lint(BAD[rule][0], Allowances({rule: {"f": "a reason"}})) == []


def test_an_exception_that_nothing_needs_is_a_finding() -> None:
    (finding,) = lint(GOOD, Allowances({"dynamic_sql": {"gone": "a reason"}}))
    assert (finding.rule, "gone" in finding.message) == ("stale_allowance", True)


def test_an_exception_needs_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "allowed.toml"
    path.write_text('[dynamic_sql]\nf = " "\n')
    with pytest.raises(ValueError, match=r"\[dynamic_sql\] f: say why it may"):
        Allowances.read(path)


def test_long_files_and_names_that_say_nothing_are_found(tmp_path: Path) -> None:
    (tmp_path / "pgworker_client").mkdir()
    (tmp_path / "pgworker_client/long.py").write_text("pass\n" * 401)
    (tmp_path / "long.sql").write_text("select;\n" * 501)
    (tmp_path / "utils.py").write_text("")
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers/claim.py").write_text("")
    found = {(finding.path, finding.rule) for finding in file_rules.check_files(tmp_path)}
    assert found == {
        ("pgworker_client/long.py", "length"),
        ("long.sql", "length"),
        ("utils.py", "names"),
        ("helpers/claim.py", "names"),
    }


def test_the_extension_keeps_the_rules() -> None:
    assert check_parts() == []


def test_the_project_s_files_keep_the_rules() -> None:
    assert file_rules.check_files() == []


def test_plpgsql_check_finds_nothing() -> None:
    checker = find_checker()
    if checker is None:
        pytest.skip(f"none of {[one.major for one in installations()]} has plpgsql_check")
    assert check_installed(checker, Allowances.read()) == []
