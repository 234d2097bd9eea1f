"""The rules for the extension's SQL. Each takes what was parsed and yields what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pglast import ast
from pglast.parser import ParseError

from tests.lint.findings import Allowances, Finding
from tests.lint.statements import Function, Statement, dotted, find_all, functions, type_name

SEARCH_PATH = ["pg_catalog", "pg_temp"]
ROW_TYPES = {"jobs", "live", "claimed_job", "schedules"}
"""Types whose columns are the contract: expanding a row of them with ``*`` says exactly what is meant."""

Rule = Callable[[list[Statement], Allowances], Iterator[Finding]]


def search_path(statements: list[Statement], _: Allowances) -> Iterator[Finding]:
    """A function pins its search_path, unless its body was bound when it was created."""
    for function in functions(statements):
        pinned = [
            [_constant(value) for value in option.arg.args or ()]
            for option in function.node.options
            if option.defname == "set" and option.arg.name == "search_path"
        ]
        if function.is_bound:
            if pinned:
                yield _at(function, "search_path", "a SQL-standard body needs none, and with one is not inlined")
        elif pinned != [SEARCH_PATH]:
            yield _at(function, "search_path", "does not set search_path = pg_catalog, pg_temp")


def stated(statements: list[Statement], _: Allowances) -> Iterator[Finding]:
    """A function states its volatility and whether it may run in parallel."""
    for function in functions(statements):
        for option in ("volatility", "parallel"):
            if option not in function.options and not function.node.is_procedure:
                yield _at(function, "stated", f"does not state its {option}")


def security_definer(statements: list[Statement], allowed: Allowances) -> Iterator[Finding]:
    """Only listed functions run with their owner's rights."""
    for function in functions(statements):
        definer = function.options.get("security")
        if definer is not None and definer.boolval and not allowed.permits("security_definer", function.name):
            yield _at(function, "security_definer", "is SECURITY DEFINER and not listed as one that may be")


def qualified(statements: list[Statement], _: Allowances) -> Iterator[Finding]:
    """A relation is named with its schema; a transition table has none."""
    triggers: list[Any] = [statement.node for statement in statements if isinstance(statement.node, ast.CreateTrigStmt)]
    for _path, _line, _function, tree in _trees(statements):  # a function may make one
        triggers += find_all(tree, ast.CreateTrigStmt)
    transitions = {named.name for trigger in triggers for named in trigger.transitionRels or ()}
    for path, line, name, tree in _trees(statements):
        local = {cte.ctename for cte in find_all(tree, ast.CommonTableExpr)} | transitions
        locked = {id(one) for clause in find_all(tree, ast.LockingClause) for one in clause.lockedRels or ()}
        for relation in find_all(tree, ast.RangeVar):
            if id(relation) in locked:  # FOR UPDATE OF an alias
                continue
            if not relation.schemaname and relation.relname not in local:
                yield Finding(path, line, "qualified", f"{name}: relation {relation.relname} without its schema")


def star(statements: list[Statement], allowed: Allowances) -> Iterator[Finding]:
    """No ``*`` but on rows whose columns are the contract: what a star means changes under a running function."""
    contract = ROW_TYPES | {function.name for function in functions(statements) if function.returns in ROW_TYPES}
    for path, line, name, tree in _trees(statements):
        hidden = {cte.ctename for cte in find_all(tree, ast.CommonTableExpr)}
        for query in find_all(tree, ast.SelectStmt, ast.InsertStmt, ast.UpdateStmt, ast.DeleteStmt):
            for target in _targets(query):
                reference = getattr(target, "val", None)
                if not isinstance(reference, ast.ColumnRef) or not isinstance(reference.fields[-1], ast.A_Star):
                    continue
                alias = reference.fields[0].sval if len(reference.fields) > 1 else None
                sources = _sources(query)
                known = [sources[alias]] if alias in sources else list(sources.values())
                # A row variable, or the alias of an outer query's: not a table's columns by another name.
                foreign = alias is not None and alias not in sources
                said = known and all(one in contract | hidden for one in known)
                if not foreign and not said and not allowed.permits("star", name):
                    yield Finding(path, line, "star", f"{name}: {alias + '.' if alias else ''}*: name the columns")


def dynamic_sql(statements: list[Statement], allowed: Allowances) -> Iterator[Finding]:
    """Only listed functions put SQL together at run time."""
    for function in _plpgsql(statements):
        for kind, line, content in function.nodes():
            dynamic = kind in ("PLpgSQL_stmt_dynexecute", "PLpgSQL_stmt_dynfors") or "dynquery" in content
            if dynamic and not allowed.permits("dynamic_sql", function.name):
                yield _at(function, "dynamic_sql", "EXECUTE", line)


def exception_block(statements: list[Statement], allowed: Allowances) -> Iterator[Finding]:
    """Only listed functions catch errors: every such block is a subtransaction."""
    for function in _plpgsql(statements):
        for kind, line, content in function.nodes():
            catches = kind == "PLpgSQL_stmt_block" and "exceptions" in content
            if catches and not allowed.permits("exception_block", function.name):
                yield _at(function, "exception_block", "EXCEPTION", line)


def variable_names(statements: list[Statement], _: Allowances) -> Iterator[Finding]:
    """A declared variable begins with ``v_``, so that no column can be meant by it; one letter may count a loop."""
    for function in _plpgsql(statements):
        for variable, line in function.variables():
            if not variable.startswith("v_") and len(variable) > 1:
                yield _at(function, "variable_names", f"variable {variable} does not begin with v_", line)


def literal_state(statements: list[Statement], allowed: Allowances) -> Iterator[Finding]:
    """A state is compared with literals: then the planner can see which index holds it."""
    for path, line, name, tree in _trees(statements):
        for comparison in find_all(tree, ast.A_Expr):
            sides = [_last_name(side) for side in (comparison.lexpr, comparison.rexpr)]
            variable = next((side for side in sides if side and side.startswith(("p_", "v_"))), None)
            if "state" in sides and variable and not allowed.permits("literal_state", name):
                yield Finding(path, line, "literal_state", f"{name}: state is compared with {variable}")


def commented(statements: list[Statement], _: Allowances) -> Iterator[Finding]:
    """Every function, table, view, type, sequence and schema says in a COMMENT what it is."""
    said = {_described(one.node) for one in statements if isinstance(one.node, ast.CommentStmt)}
    for statement in statements:
        node, name = statement.node, ""
        if isinstance(node, ast.CreateFunctionStmt):
            name = Function(statement).signature
        elif isinstance(node, ast.CreateStmt):
            name = _relation(node.relation)
        elif isinstance(node, ast.CreateTableAsStmt):
            name = _relation(node.into.rel)
        elif isinstance(node, ast.ViewStmt):
            name = _relation(node.view)
        elif isinstance(node, ast.CreateSeqStmt):
            name = _relation(node.sequence)
        elif isinstance(node, ast.CompositeTypeStmt):
            name = _relation(node.typevar)
        elif isinstance(node, ast.CreateEnumStmt):
            name = dotted(node.typeName)
        elif isinstance(node, ast.CreateDomainStmt):
            name = dotted(node.domainname)
        elif isinstance(node, ast.CreateSchemaStmt):
            name = node.schemaname
        if name and name not in said:
            yield Finding(statement.path, statement.line, "commented", f"{name} has no COMMENT")


def check_beginning(statements: list[Statement]) -> list[Finding]:
    """The script pins its search_path first: CREATE EXTENSION looks at public, where anybody may have left a trap.

    Defaults, views, constraints and SQL-standard bodies are bound to what their names mean while the script runs.
    """
    first = statements[0].node
    pins = isinstance(first, ast.VariableSetStmt) and first.is_local and first.name == "search_path"
    if pins and [_constant(value) for value in first.args] == SEARCH_PATH:
        return []
    says = "the script does not begin with: set local search_path = pg_catalog, pg_temp;"
    return [Finding(statements[0].path, statements[0].line, "beginning", says)]


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        search_path,
        stated,
        security_definer,
        qualified,
        star,
        dynamic_sql,
        exception_block,
        variable_names,
        literal_state,
        commented,
    )
}


def check_sql(statements: list[Statement], allowed: Allowances) -> list[Finding]:
    """Apply every rule, and name the exceptions that nothing needs."""
    broken: dict[str, Finding] = {}
    for function in functions(statements):
        try:
            list(function.pieces())
        except ParseError as error:
            broken[function.statement.text] = _at(function, "parse", str(error))
    sound = [statement for statement in statements if statement.text not in broken]
    found = [finding for rule in RULES.values() for finding in rule(sound, allowed)]
    return sorted({*found, *broken.values()}) + allowed.unused(set(RULES))


def _at(function: Function, rule: str, message: str, line: int | None = None) -> Finding:
    return Finding(function.statement.path, line or function.statement.line, rule, f"{function.name}: {message}")


def _plpgsql(statements: list[Statement]) -> list[Function]:
    return [function for function in functions(statements) if function.language == "plpgsql"]


def _trees(statements: list[Statement]) -> Iterator[tuple[str, int, str, Any]]:
    """Yield path, line, name and syntax tree of all SQL: plain statements, and what stands in functions."""
    for statement in statements:
        if isinstance(statement.node, ast.CreateFunctionStmt):
            function = Function(statement)
            for piece in function.pieces():
                yield statement.path, piece.line, function.name, piece.node
        elif not isinstance(statement.node, ast.CommentStmt):
            yield statement.path, statement.line, type(statement.node).__name__, statement.node


def _targets(query: Any) -> tuple[Any, ...]:
    """Return what a query gives back."""
    if isinstance(query, ast.SelectStmt):
        return query.targetList or ()
    returning = getattr(query, "returningClause", None)  # PostgreSQL 18's grammar; a plain list before
    return (returning.exprs if returning else getattr(query, "returningList", None)) or ()


def _sources(query: Any) -> dict[str, str]:
    """Return what a query reads, alias to name of the relation or function ('' for a subquery)."""
    clauses: list[Any] = []
    if isinstance(query, ast.SelectStmt):
        clauses = list(query.fromClause or ())
    else:
        clauses = [
            query.relation,
            *(getattr(query, "fromClause", None) or ()),
            *(getattr(query, "usingClause", None) or ()),
        ]
    found: dict[str, str] = {}
    while clauses:
        item = clauses.pop(0)
        if isinstance(item, ast.JoinExpr):
            clauses += [item.larg, item.rarg]
            continue
        name = ""
        if isinstance(item, ast.RangeVar):
            name = item.relname
        elif isinstance(item, ast.RangeFunction):
            call = item.functions[0][0]
            name = call.funcname[-1].sval if isinstance(call, ast.FuncCall) else ""
        found[item.alias.aliasname if getattr(item, "alias", None) else name] = name
    return found


def _last_name(node: Any) -> str | None:
    if isinstance(node, ast.TypeCast):
        node = node.arg
    if isinstance(node, ast.ColumnRef) and isinstance(node.fields[-1], ast.String):
        return str(node.fields[-1].sval)
    return None


def _constant(node: Any) -> str:
    return str(node.val.sval) if isinstance(node, ast.A_Const) else ""


def _relation(node: Any) -> str:
    return f"{node.schemaname}.{node.relname}" if node.schemaname else str(node.relname)


def _described(node: Any) -> str:
    """Return what a COMMENT is about, written as `commented` writes it."""
    about = node.object
    if isinstance(about, ast.ObjectWithArgs):
        return f"{dotted(about.objname)}({', '.join(map(type_name, about.objargs or ()))})"
    if isinstance(about, ast.TypeName):
        return dotted(about.names)
    return about.sval if isinstance(about, ast.String) else dotted(about)
