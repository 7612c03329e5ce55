"""Paged APIs and the crawler against a server that misbehaves; the server's own log is the judge."""

import gzip
import hashlib
import io
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from contextlib import closing
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from itertools import pairwise
from urllib.parse import urlsplit

import pandas as pd
import pytest
from web_server import Reply, Web

for module in ("duckdb", "ibis", "httpx", "bs4", "lxml", "protego"):
    pytest.importorskip(module)

from bs4 import BeautifulSoup  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from bigmodel_nb.etl.api import Api, by_cursor, by_link, by_number, by_offset, read_api  # noqa: E402
from bigmodel_nb.etl.crawl import (  # noqa: E402
    Bounds,
    crawl,
    html_tables,
    parse_page,
    parse_sitemap,
    read_pages,
    read_tables,
)
from bigmodel_nb.etl.extract import connect  # noqa: E402
from bigmodel_nb.etl.http import Pace, Patience, decode, normalize_url  # noqa: E402

QUICK = Patience(tries=4, timeout=5, base=0.01, total=20)
posix = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")


@pytest.fixture
def web():
    server = Web()
    yield server
    server.close()


@pytest.fixture
def stranger():
    server = Web()
    yield server
    server.close()


# --- paged APIs -----------------------------------------------------------------------------------------------------


def shop(web: Web, rows: list[dict], size: int = 10) -> None:
    "Serve `rows` in the four common ways of paging."

    def page(number: int, **headers: str) -> Reply:
        cut = rows[(number - 1) * size : number * size]
        more = number * size < len(rows)
        body = {"data": cut, "next": f"c{number + 1}" if more else None, "url": f"/url?page={number + 1}" if more else None}
        return Reply(json.dumps(body), kind="application/json", **headers)

    def linked(query: dict[str, str]) -> Reply:
        number = int(query.get("page", 1))
        cut = rows[(number - 1) * size : number * size]
        more = {"Link": f'<{web.home}/link?page={number + 1}>; rel="next"'} if number * size < len(rows) else {}
        return Reply(json.dumps({"data": cut}), kind="application/json", **more)

    web.routes["/number"] = web.routes["/url"] = lambda query: page(int(query.get("page", 1)))
    web.routes["/offset"] = lambda query: Reply(json.dumps({"data": rows[int(query.get("offset", 0)) :][:size]}))
    web.routes["/cursor"] = lambda query: page(int(query.get("cursor", "c1")[1:]))
    web.routes["/link"] = linked


def apis(web: Web) -> dict[str, Api]:
    return {
        "number": Api("shop", f"{web.home}/number", by_number(), "data"),
        "offset": Api("shop", f"{web.home}/offset", by_offset(), "data"),
        "cursor": Api("shop", f"{web.home}/cursor", by_cursor(), "data"),
        "url": Api("shop", f"{web.home}/url", by_cursor("url", None), "data"),
        "link": Api("shop", f"{web.home}/link", by_link, "data"),
    }


def rows_of(n: int) -> list[dict]:
    return [{"id": k, "name": f"item {k}", "price": k / 4} for k in range(n)]


def ids(table) -> list[int]:
    return table.to_pandas()["id"].astype(int).tolist()


def read(con, api, **more):
    return read_api(con, api, pace=Pace(), patience=more.pop("patience", QUICK), **more)


@pytest.mark.parametrize("way", ["number", "offset", "cursor", "url", "link"])
@pytest.mark.parametrize("n", [0, 1, 40, 57])
def test_every_row_once_through_faults(web, way, n):
    rows, rng = rows_of(n), random.Random(n)
    shop(web, rows)
    api = apis(web)[way]
    read(connect(), api)
    faults = [
        Reply("busy", 429, Retry_After="0"),
        Reply("oops", 500),
        Reply("<p>gateway", 502),
        Reply('{"data": [', promise=50),
    ]
    for path in web.counts():
        web.faults[path] = rng.sample(faults, k=rng.randint(0, 2))
    expected = sum(map(len, web.faults.values()))
    web.log.clear()
    table = read(connect(), api)
    assert table.count().execute() == n
    if n:
        assert ids(table) == [row["id"] for row in rows]
        assert table.to_pandas()["price"].astype(float).tolist() == [row["price"] for row in rows]
    assert sum(1 for _ in web.log) == expected + len(web.counts())


@pytest.mark.parametrize("way", ["number", "offset", "cursor", "url", "link"])
def test_second_run_transfers_what_changed(web, way):
    rows, con = rows_of(35), connect()
    shop(web, rows)
    api = apis(web)[way]
    read(con, api)
    web.log.clear()
    assert ids(read(con, api)) == list(range(35))
    # a Link header is no part of the body that an ETag marks: there the last page is read again, to see whether it still is
    assert sum(request.sent > 0 for request in web.log) == (1 if way == "link" else 0)
    rows.extend({**row, "id": row["id"] + 35} for row in rows_of(15))  # 50 rows: the last page is now full
    assert ids(read(con, api)) == list(range(50))
    rows.extend({**row, "id": row["id"] + 50} for row in rows_of(5))  # and one more page appears behind it
    assert ids(read(con, api)) == list(range(55))
    del rows[20:]
    assert ids(read(con, api)) == list(range(20))


def test_retry_after_is_kept_in_both_forms(web):
    shop(web, rows_of(5))
    for form in ("seconds", "date"):
        web.log.clear()
        soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2), usegmt=True)
        web.faults["/cursor"] = [Reply("", 429, Retry_After="1" if form == "seconds" else soon)]
        read(connect(), apis(web)["cursor"])
        # a date is cut to whole seconds, and some time passes before it is served
        assert web.log[1].at - web.log[0].at >= (1.0 if form == "seconds" else 0.3)


def test_the_rate_holds_on_the_servers_clock(web):
    shop(web, rows_of(80))
    read_api(connect(), apis(web)["cursor"], pace=Pace(rate=40, burst=2), patience=QUICK)
    times = [request.at for request in web.log]
    assert len(times) == 8 and times[-1] - times[0] >= 6 / 40 - 0.02  # a burst of two, then 40 a second


@pytest.mark.parametrize("reply", [Reply("", 503), Reply("", 429, Retry_After="9999"), Reply("x" * 999, trickle=0.05)])
def test_a_run_ends_in_time(web, reply):
    web.routes["/x"] = reply
    began = time.monotonic()
    patience = Patience(tries=1000, timeout=0.2, base=0.05, cap=0.1, total=0.6)
    with pytest.raises((TimeoutError, ConnectionError), match="/x"):
        read_api(connect(), Api("x", f"{web.home}/x", by_number()), pace=Pace(), patience=patience)
    assert time.monotonic() - began < 10


BAD = {
    "login page": (Reply("<html><h1>Sign in</h1>"), "page 3.*not JSON but text/html.*Sign in"),
    "cut JSON": (Reply('{"data": [{"id": 1}', kind="application/json"), "page 3.*not JSON"),
    "unauthorised": (Reply('{"message": "no"}', 401), "page 3.*status 401.*credentials"),
    "no list": (Reply('{"data": {"id": 1}, "next": null}'), "page 3.*JSON object, not a list"),
    "no records": (Reply('{"rows": [], "next": null}'), "page 3.*no 'data'.*rows"),
    "no way on": (Reply('{"data": [{"id": 1, "name": "n", "price": 1}]}'), "no 'next'"),
    "a text for a number": (
        Reply('{"data": [{"id": "a", "name": "n", "price": 1}], "next": null}'),
        "page 3.*'id' was number and is string",
    ),
    "a field gone": (Reply('{"data": [{"id": 1, "name": "n"}], "next": null}'), "page 3.*'price' is missing"),
    "a field new": (Reply('{"data": [{"id": 1, "name": "n", "price": 1, "tax": 2}], "next": null}'), "'tax' is new"),
    "a circle": (Reply('{"data": [{"id": 1, "name": "n", "price": 1}], "next": "c2"}'), "in a circle"),
    "a huge body": (Reply("x" * 3_000_000), "page 3.*more than 1,000,000 bytes"),
    "our own field": (Reply('{"data": [{"_row": 1}], "next": null}'), "record 1: has a field _source or _row"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_pages_are_named_and_nothing_is_kept(web, what):
    reply, said = BAD[what]
    shop(web, rows_of(45))
    web.routes["/cursor?cursor=c3"] = reply
    con, api = connect(), apis(web)["cursor"]
    patience = Patience(tries=2, timeout=5, base=0.01, limit=1_000_000)
    with pytest.raises(ValueError, match=said) as caught:
        read(con, api, patience=patience)
    assert "/cursor?cursor=c" in str(caught.value)
    assert "api_shop_records" not in con.list_tables() or con.table("api_shop_records").count().execute() == 0
    del web.routes["/cursor?cursor=c3"]
    assert ids(read(con, api)) == list(range(45))
    assert web.log[-1].sent < 10_000


def test_drift_can_be_accepted(web):
    shop(web, rows_of(15))
    web.routes["/cursor?cursor=c2"] = Reply('{"data": [{"id": "x", "tax": 2}], "next": null}')
    frame = read(connect(), apis(web)["cursor"], drift=True).to_pandas()
    assert frame["tax"].tolist()[-1] == "2" and frame["id"].tolist()[-1] == "x" and frame["tax"].isna().sum() == 10


def test_names_that_make_no_columns(web):
    for record in ('{"id": 1, "ID": 2}', '{"": 1}', '{"a": [{"id": 1}, {"Id": 2}]}'):
        web.routes["/odd"] = Reply(f"[{record}]", kind="application/json")
        with pytest.raises(ValueError, match="make no table"):
            read(connect(), Api("odd", f"{web.home}/odd", by_link))
    web.routes["/odd"] = Reply('[{"a b": {"VARCHAR": [1.10, null]}, "c": [], "d": {}, "é\\"": true}]')
    frame = read(connect(), Api("odd", f"{web.home}/odd", by_link)).to_pandas()
    assert frame.columns.tolist() == ["a b", "c", "d", 'é"', "_source", "_row"]
    assert list(frame["a b"][0]["VARCHAR"]) == ["1.10", None] and frame['é"'][0] == "true"


def test_not_modified_without_being_asked(web, tmp_path):
    web.routes["/"] = Reply("", 304)
    with pytest.raises(ValueError, match="page 1: status 304"):
        read(connect(), Api("odd", f"{web.home}/", by_link))
    go(tmp_path / "c.db", web)
    assert kept(tmp_path / "c.db")["/"][3] == "status 304"


def test_a_broken_walk_goes_on(web):
    shop(web, rows_of(57))
    con, api = connect(), apis(web)["link"]
    web.faults["/link?page=4"] = [Reply("", 500)] * QUICK.tries
    with pytest.raises(ConnectionError, match="page=4"):
        read(con, api, whole=False)
    web.log.clear()
    assert ids(read(con, api, whole=False)) == list(range(57))
    assert [request.path for request in web.log] == ["/link?page=4", "/link?page=5", "/link?page=6"]


def test_credentials_stay_on_one_server_and_out_of_sight(web, stranger, tmp_path):
    shop(web, rows_of(30))
    stranger.routes["/steal"] = Reply("[]")
    secret, key = "s3cr3t-token", "qu3ry key/+"
    for path in ("/moved", "/linked"):
        web.routes[path] = Reply("", 302, Location=f"{stranger.home}/steal")
    web.routes["/linked"] = Reply("[{}]", Link=f'<{stranger.home}/steal>; rel="next"')
    web.routes["/echo"] = lambda query: Reply(f"<p>you sent {secret} and {query['key']}", 403)
    web.routes["/down"] = Reply("", 503)
    texts = []
    for path in ("/moved", "/linked", "/echo", "/down", "/cursor"):
        database = tmp_path / f"{path[1:]}.duckdb"
        con = connect(database)
        records = "data" if path == "/cursor" else ""
        paging = by_cursor() if path == "/cursor" else by_link
        api = Api("x", web.home + path, paging, records, {"Authorization": f"Bearer {secret}"}, {"key": key})
        try:
            read(con, api, whole=False)
        except (ValueError, OSError) as error:
            texts.append("".join(traceback.format_exception(error)) + repr(error) + repr(api))
        con.disconnect()
        texts.append(database.read_bytes().decode("latin-1"))
    assert len(texts) == 9 and stranger.log == []
    assert web.log[-1].headers["authorization"] == f"Bearer {secret}" and "key=" in web.log[-1].path
    for form in (secret, key, "qu3ry+key%2F%2B", "qu3ry%20key%2F%2B"):
        assert not any(form in text for text in texts)


API_CHILD = """
import sys
from bigmodel_nb.etl.api import Api, by_cursor, read_api
from bigmodel_nb.etl.extract import connect
from bigmodel_nb.etl.http import Pace
con = connect(sys.argv[1])
read_api(con, Api("shop", sys.argv[2] + "/cursor", by_cursor(), "data"), whole=sys.argv[3] == "whole", pace=Pace(gap=0.01))
"""


def killed(code: str, *arguments: str, web: Web, requests: int) -> bool:
    "Run a child and kill it once the server has had so many more requests; whether it had to be killed."
    enough = len(web.log) + requests
    with subprocess.Popen([sys.executable, "-c", code, *arguments]) as child:
        while len(web.log) < enough and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    return child.returncode == -signal.SIGKILL


@posix
@pytest.mark.parametrize("mode", ["whole", "partly"])
def test_an_api_run_killed_leaves_whole_pages(web, tmp_path, mode):
    shop(web, rows_of(300))
    database = tmp_path / "a.duckdb"
    assert killed(API_CHILD, str(database), web.home, mode, web=web, requests=12)
    con, before = connect(database), web.counts()
    kept = con.table("api_shop_records").count().execute() if "api_shop_records" in con.list_tables() else 0
    assert kept % 10 == 0 and (kept == 0 if mode == "whole" else 0 < kept < 300)
    assert ids(read(con, apis(web)["cursor"], whole=False)) == list(range(300))
    again = sum(n - 1 for n in web.counts().values())
    assert again <= (len(before) if mode == "whole" else 1)  # only the page in flight


# --- the crawler ----------------------------------------------------------------------------------------------------

PATIENCE = Patience(tries=3, timeout=1, base=0.01, limit=300_000)


def links(*targets: str, **attributes: str) -> str:
    extra = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return " ".join(f'<a href="{target}"{extra}>{target}</a>' for target in targets)


def go(path, web, *starts, delay=0.0, bounds=None, patience=PATIENCE):
    return crawl(path, [web.home + start for start in starts or ("/",)], "bookworm/1.0 (test)", delay, bounds, patience)


def kept(path, columns="status, title, text, problem") -> dict:
    "Stored pages by path and query."
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute(f"SELECT url, {columns} FROM pages").fetchall()
    return {re.sub(r"^http://[^/]*", "", row[0]): row[1:] for row in rows}


def pages_asked(web: Web) -> Counter:
    return Counter({path: n for path, n in web.counts().items() if path not in ("/robots.txt", "/sitemap.xml")})


def random_site(web: Web, n: int = 40, seed: int = 0) -> set[str]:
    "A random graph of pages, a third of it closed; the paths that may be reached through open pages."
    rng = random.Random(seed)
    names = ["/"] + [f"/{'closed' if k % 3 == 0 else 'open'}/{k}" for k in range(1, n)]
    edges = {name: rng.sample(names, 4) for name in names}
    for name in names:
        noise = [f"{target}#part" for target in edges[name]] + [f"{target}?utm_source=x" for target in edges[name]]
        web.routes[name] = Reply(f"<title>{name}</title><p>text of {name}</p>" + links(*edges[name], *noise))
    web.routes["/robots.txt"] = Reply("User-agent: *\nDisallow: /closed\nAllow: /closed/3\n", kind="text/plain")
    reach, todo = set(), ["/"]
    while todo:
        name = todo.pop()
        if name not in reach and (not name.startswith("/closed") or name.startswith("/closed/3")):
            reach.add(name)
            todo += edges[name]
    return reach


@pytest.mark.parametrize("seed", range(3))
def test_allowed_pages_once_and_closed_never(web, tmp_path, seed):
    reach = random_site(web, seed=seed)
    report = go(tmp_path / "c.db", web)
    assert pages_asked(web) == Counter(dict.fromkeys(reach, 1))
    assert web.counts()["/robots.txt"] == 1
    assert {request.headers["user-agent"] for request in web.log} == {"bookworm/1.0 (test)"}
    stored = kept(tmp_path / "c.db")
    assert stored.keys() == reach and all(row[:2] == (200, path) for path, row in stored.items())
    assert report["state"].isin(["done", "skipped"]).all() and report.query("reason == 'robots.txt'")["addresses"].sum() > 0


ROBOTS = {
    "our own group first": ("User-agent: *\nDisallow: /\nUser-agent: bookworm\nDisallow: /b\n", {"/a.pdf", "/c"}),
    "wildcard and end": ("User-agent: *\nDisallow: /*.pdf$\nDisallow: /c*x\n", {"/b", "/c"}),
    "longest match": ("User-agent: *\nDisallow: /\nAllow: /c\nAllow: /$\n", {"/c"}),
    "not a robots.txt": ("<html><body>Welcome", {"/a.pdf", "/b", "/c"}),
}


@pytest.mark.parametrize("what", ROBOTS)
def test_robots_rules(web, tmp_path, what):
    text, expected = ROBOTS[what]
    web.routes |= {path: Reply(path) for path in ("/a.pdf", "/b", "/c")} | {"/": Reply(links("/a.pdf", "/b", "/c"))}
    web.routes["/robots.txt"] = Reply("\ufeff" + text, kind="text/plain")
    go(tmp_path / "c.db", web)
    assert set(pages_asked(web)) == expected | {"/"}


@pytest.mark.parametrize("status, allowed", [(404, True), (403, True), (500, False), (503, False), (429, False)])
def test_robots_unreadable(web, tmp_path, status, allowed):
    web.routes |= {"/": Reply(links("/a")), "/a": Reply("a"), "/robots.txt": Reply("Disallow: /", status)}
    report = go(tmp_path / "c.db", web)
    assert set(pages_asked(web)) == ({"/", "/a"} if allowed else set())
    if not allowed:
        assert "deferred" in set(report["state"]) and str(status) in " ".join(report["reason"])
        web.routes["/robots.txt"] = Reply("")  # the server has recovered: nothing is lost
        go(tmp_path / "c.db", web)
        assert set(pages_asked(web)) == {"/", "/a"}


def test_robots_hanging_refuses(web, tmp_path):
    web.routes |= {"/": Reply("x"), "/robots.txt": Reply("x" * 999, trickle=0.05)}
    go(tmp_path / "c.db", web, patience=Patience(tries=2, timeout=0.2, base=0.01))
    assert not pages_asked(web)


@pytest.mark.parametrize("ours, theirs", [(0.05, None), (0.0, 0.05), (0.05, 0.01)])
def test_the_delay_is_kept(web, tmp_path, ours, theirs):
    random_site(web, n=30)
    if theirs:
        web.routes["/robots.txt"] = Reply(f"User-agent: *\nCrawl-delay: {theirs}\n")
    web.faults["/open/1"] = [Reply("", 500)]  # a second attempt waits too
    go(tmp_path / "c.db", web, delay=ours)
    times = [request.at for request in web.log]
    gaps = [after - before for before, after in pairwise(times)]
    assert len(gaps) >= 8 and min(gaps) >= max(ours, theirs or 0)


def test_retry_after_of_a_page(web, tmp_path):
    web.routes["/"] = Reply("<title>at last")
    web.faults["/"] = [Reply("", 429, Retry_After="1"), Reply("", 503, Retry_After="0")]
    go(tmp_path / "c.db", web)
    times = [request.at for request in web.log if request.path == "/"]
    assert len(times) == 3 and times[1] - times[0] >= 1 and kept(tmp_path / "c.db")["/"][1] == "at last"


def test_redirects(web, stranger, tmp_path):
    stranger.routes["/"] = Reply("you should not be here")
    web.routes |= {
        "/": Reply(links("/chain0", "/loop0", "/me", "/away", "/nowhere", "/protocol")),
        "/loop0": Reply("", 302, Location="/loop1"),
        "/loop1": Reply("", 302, Location="/loop0"),
        "/me": Reply("", 301, Location="/me#again"),
        "/away": Reply("", 301, Location=f"{stranger.home}/"),
        "/nowhere": Reply("", 301),
        "/protocol": Reply("", 302, Location="ftp://h.example/"),
        "/endless": lambda q: Reply("", 302, Location=f"/endless?n={int(q.get('n', 0)) + 1}"),
        "/chain7": Reply("<title>end of the chain"),
    }
    web.routes |= {f"/chain{n}": Reply("", 301, Location=f"/chain{n + 1}") for n in range(7)}
    report = go(tmp_path / "c.db", web, "/", "/endless", bounds=Bounds(depth=20))
    assert stranger.log == [] and "another host" in set(report["reason"])
    assert max(pages_asked(web).values()) == 1 and sum("/endless" in path for path in pages_asked(web)) <= 21
    stored = kept(tmp_path / "c.db")
    assert stored["/chain7"][1] == "end of the chain" and "itself" in stored["/me"][3]


def test_traps_end(web, tmp_path):
    web.routes |= {
        "/": Reply(links("/cal?m=0", "/deep/", "/grow?q=a", "/real")),
        "/real": Reply("<title>real"),
        "/cal": lambda q: Reply(links(*(f"/cal?m={int(q['m']) + k}" for k in range(-12, 13)))),
        "/grow": lambda q: Reply(links(f"/grow?q={q['q'] * 2}")),
    }
    plain = web.reply
    web.reply = lambda path: Reply(links("x/", "y/")) if path.startswith("/deep/") else plain(path)
    report = go(tmp_path / "c.db", web, bounds=Bounds(depth=50, pages=120, alike=40))
    asked = pages_asked(web)
    assert sum("/cal" in path for path in asked) == 40 and asked["/real"] == 1 and asked.total() <= 120
    assert max(map(len, asked)) <= 500 and all(path.count("x/") <= 3 for path in asked if "deep" in path)
    assert {"more than 40 alike", "a step repeats more than 3 times"} <= set(report["reason"])


def test_slow_hanging_huge_and_foreign(web, tmp_path):
    web.routes |= {
        "/": Reply(links("/slow", "/drip", "/huge", "/pdf", "/cut", "/fine")),
        "/slow": Reply("<p>slow but sure", trickle=0.01),
        "/drip": Reply("x" * 9999, trickle=0.05),
        "/huge": Reply("y" * 20_000_000),
        "/pdf": Reply("%PDF" * 500_000, kind="application/pdf"),
        "/cut": Reply("<p>half", promise=100),
        "/fine": Reply("<p>fine"),
    }
    began = time.monotonic()
    go(tmp_path / "c.db", web, patience=Patience(tries=2, timeout=0.5, base=0.01, limit=300_000))
    stored = kept(tmp_path / "c.db")
    assert time.monotonic() - began < 20 and stored["/slow"][2] == "slow but sure" and stored["/fine"][2] == "fine"
    assert "no answer" in stored["/drip"][3] and "no answer" in stored["/cut"][3]
    assert "more than 300,000 bytes" in stored["/huge"][3] and "no HTML" in stored["/pdf"][3]
    assert sum(request.sent for request in web.log if request.path == "/huge") < 20_000_000


def test_charsets(web, tmp_path):
    text = "床位一百二十张，朱镕基"
    cases = {
        "/header": (text.encode("gb18030"), "text/html; charset=GB2312"),
        "/meta": (f"<meta charset='gb2312'>{text}".encode("gb18030"), "text/html"),
        "/lie": (text.encode(), "text/html; charset=iso-8859-1"),
        "/lie2": (text.encode("gb18030"), "text/html; charset=utf-8"),
        "/mark": (b"\xff\xfe" + text.encode("utf-16-le"), "text/html"),
        "/unknown": (text.encode(), "text/html; charset=klingon"),
        "/none": (text.encode(), ""),
        "/big5": ("<meta http-equiv=content-type content='text/html; charset=big5'>床位".encode("big5"), "text/html"),
    }
    web.routes |= {path: Reply(b"<p>" + body if path != "/mark" else body, kind=kind) for path, (body, kind) in cases.items()}
    web.routes["/"] = Reply(links(*cases, "/bad"))
    web.routes["/bad"] = Reply(b"<p>ok \xff\xff\xff", kind="text/html; charset=utf-8")
    go(tmp_path / "c.db", web)
    stored = kept(tmp_path / "c.db")
    assert {path: stored[path][2] for path in cases} == {path: "床位" if path == "/big5" else text for path in cases}
    assert "3 characters unreadable" in stored["/bad"][3]


def test_wishes_of_the_owner(web, tmp_path):
    web.routes |= {
        "/": Reply(links("/noindex", "/nofollow", "/header") + links("/marked", rel="external nofollow")),
        "/noindex": Reply("<meta name=robots content=noindex><title>t</title><p>secret<table><tr><td>1</table>" + links("/x")),
        "/nofollow": Reply("<meta name=robots content='index, NoFollow'><p>kept</p>" + links("/y")),
        "/header": Reply("<p>secret</p>" + links("/z"), X_Robots_Tag="noindex, nofollow"),
        "/x": Reply("<link rel=canonical href='/canon'>x"),
        "/canon": Reply("c"),
    }
    go(tmp_path / "c.db", web)
    assert set(pages_asked(web)) == {"/", "/noindex", "/nofollow", "/header", "/x", "/canon"}
    stored = kept(tmp_path / "c.db", "text, title, canonical")
    assert stored["/noindex"][:2] == ("", "") and stored["/header"][0] == "" and "kept" in stored["/nofollow"][0]
    assert stored["/x"][2] == web.home + "/canon" and read_tables(connect(), tmp_path / "c.db") == {}


def test_sitemaps(web, tmp_path):
    def urls(kind, *targets):
        inner = "".join(f"<{kind}><loc>{web.home}{target}</loc></{kind}>" for target in targets)
        return f"<{kind}set xmlns='http://www.sitemaps.org/schemas/sitemap/0.9'>{inner}</{kind}set>".encode()

    web.routes |= {
        "/robots.txt": Reply("User-agent: *\nDisallow: /no\nSitemap: /maps/index.xml\n"),
        "/maps/index.xml": Reply(urls("sitemap", "/m1.xml.gz", "/m2.xml", "/m3.xml", "/maps/index.xml"), kind="application/xml"),
        "/m1.xml.gz": Reply(gzip.compress(urls("url", "/p1", "/no/p")), kind="application/gzip"),
        "/m2.xml": Reply(urls("url", "/p2") + b"<broken", kind="application/xml"),
        "/m3.xml": Reply("no XML", kind="application/xml"),
    } | {path: Reply(path) for path in ("/", "/p1", "/p2", "/no/p")}
    go(tmp_path / "c.db", web)
    counts = pages_asked(web)
    assert {"/", "/p1", "/p2"} <= set(counts) and "/no/p" not in counts and max(counts.values()) == 1
    web.log.clear()
    go(tmp_path / "c.db", web)
    assert {request.path for request in web.log if request.sent} <= {"/robots.txt", "/sitemap.xml"}


def test_second_round_transfers_no_body(web, tmp_path):
    reach = random_site(web)
    go(tmp_path / "c.db", web)
    first = kept(tmp_path / "c.db", "hash, title, text")
    web.log.clear()
    go(tmp_path / "c.db", web)
    assert pages_asked(web) == Counter(dict.fromkeys(reach, 1))
    assert {request.path for request in web.log if request.sent} <= {"/robots.txt", "/sitemap.xml"}
    assert kept(tmp_path / "c.db", "hash, title, text") == first
    changed = sorted(reach)[1]
    web.routes[changed] = Reply("<title>new</title>" + links("/brand-new"))
    web.routes["/brand-new"] = Reply("new too")
    gone = sorted(reach)[2]
    del web.routes[gone]
    web.faults["/"] = [Reply("", 500)] * PATIENCE.tries  # no answer this time: what was stored stays
    go(tmp_path / "c.db", web)
    stored = kept(tmp_path / "c.db")
    assert stored[changed][1] == "new" and "/brand-new" in stored and stored[gone][0] == 404
    assert stored["/"][1] == "/" and "no answer" in stored["/"][3]


CRAWL_CHILD = """
import sys
from bigmodel_nb.etl.crawl import crawl
from bigmodel_nb.etl.http import Patience
crawl(sys.argv[1], [sys.argv[2] + "/"], "bookworm/1.0 (test)", 0.01, None, Patience(tries=3, timeout=5, limit=300_000))
"""


@posix
def test_a_killed_crawl_goes_on(web, tmp_path):
    rng, reach = random.Random(0), random_site(web, n=90)
    kills = 0
    while kills < 3 and killed(CRAWL_CHILD, str(tmp_path / "c.db"), web.home, web=web, requests=rng.randint(2, 12)):
        kills += 1
        stored = kept(tmp_path / "c.db", "title, text") if (tmp_path / "c.db").exists() else {}
        assert all(title == path and path in text for path, (title, text) in stored.items())  # whole pages only
    assert kills == 3
    go(tmp_path / "c.db", web)
    asked = pages_asked(web)
    assert asked.keys() == reach == kept(tmp_path / "c.db").keys()
    assert sum(n - 1 for n in asked.values()) <= kills  # at most the one request in flight at each kill


def test_two_crawls_of_one_file(web, tmp_path):
    web.routes["/"] = lambda query: (go(tmp_path / "c.db", web), Reply("x"))[1]  # a second crawl in the middle of the first
    caught = []
    plain = web.reply

    def reply(path):
        try:
            return plain(path)
        except ValueError as error:
            caught.append(str(error))
            return Reply("<title>x")

    web.reply = reply
    go(tmp_path / "c.db", web, patience=QUICK)
    assert len(caught) == 1 and "Another crawl has this file open" in caught[0]
    assert kept(tmp_path / "c.db")["/"][1] == "x"


def test_several_hosts_and_none(web, stranger, tmp_path):
    for server in (web, stranger):
        server.routes |= {"/": Reply(links("/a")), "/a": Reply("a")}
    stranger.routes["/robots.txt"] = Reply("", 500)
    crawl(tmp_path / "c.db", [web.home, stranger.home], "bookworm", 0.0, None, PATIENCE)
    assert set(pages_asked(web)) == {"/", "/a"} and not pages_asked(stranger)
    for starts, agent in (([], "x"), (["mailto:a@b.c"], "x"), ([web.home], " ")):
        with pytest.raises(ValueError, match="must be web addresses"):
            crawl(tmp_path / "d.db", starts, agent)
    (tmp_path / "text.db").write_text("not a database, and long enough to be told from one" * 50)
    with pytest.raises(ValueError, match="it is no crawl"):
        crawl(tmp_path / "text.db", [web.home], "bookworm")


def test_pages_and_tables_with_provenance(web, tmp_path):
    table = "<table><tr><th>name<th>name<th></tr><tr><td rowspan=2>x<td>01<td>é</tr><tr><td colspan=2>2</table>"
    web.routes["/"] = Reply(f"<title>T</title><table><tr><td>{table}</table>{table}")
    go(tmp_path / "c.db", web)
    con = connect()
    found = read_tables(con, tmp_path / "c.db")
    assert [number for _, number in found] == [2, 3]
    frame = found[f"{web.home}/", 2].to_pandas()
    assert frame.columns.tolist() == ["name", "name (2)", "column_3", "_source", "_row"]
    assert frame.iloc[:, :3].to_numpy().tolist() == [["x", "01", "é"], ["x", "2", "2"]]
    assert frame["_source"].tolist() == [f"{web.home}/#table=2"] * 2 and frame["_row"].tolist() == [1, 2]
    page = read_pages(con, tmp_path / "c.db").to_pandas().iloc[0]
    assert page["hash"] == hashlib.sha256(web.routes["/"].body).hexdigest() and page["status"] == "200"


# --- properties -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_spans_give_back_the_tiling_they_came_from(height, width, rng):
    grid: list[list[str | None]] = [[None] * width for _ in range(height)]
    html = "<table>"
    for y in range(height):
        html += "<tr>"
        for x in range(width):
            if grid[y][x] is None:
                free = next((n for n in range(x, width) if grid[y][n] is not None), width) - x
                down, across = rng.randint(1, height - y), rng.randint(1, free)
                for line in grid[y : y + down]:
                    line[x : x + across] = [f"{y}.{x}"] * across
                html += f"<td rowspan={down} colspan={across}>{y}.{x}"
    assert html_tables(BeautifulSoup(html + "</table>", "lxml"))[0][0]["rows"] == grid
    pandas = pd.read_html(io.StringIO(html + "</table>"), converters={n: str for n in range(width)})[0]
    assert pandas.to_numpy().tolist() == grid


@pytest.mark.filterwarnings("error")
def test_odd_documents_are_quiet():
    xhtml = b'<?xml version="1.0" encoding="gb2312"?><html xmlns="http://www.w3.org/1999/xhtml"><p>' + "床".encode("gb18030")
    feed = b"<?xml version='1.0'?><rss><channel><title>T</title></channel></rss>"
    assert parse_page(xhtml, "http://h.example/").text == "床"
    for body in (feed, b"http://h.example/", b"file.html", b"", b"\xff\xfe", b"<p>" * 20_000, b"<table>" * 200):
        assert parse_page(body, "http://h.example/").links == []


def test_spans_that_leave_holes_or_overlap():
    def rows(cells):
        return html_tables(BeautifulSoup(f"<table>{cells}</table>", "lxml"))[0][0]["rows"]

    # pandas.read_html closes the gap and moves b to the left; a browser does not
    assert rows("<tr><td>a<td>a<td rowspan=2>b</tr><tr><td>c</tr>") == [["a", "a", "b"], ["c", None, "b"]]
    assert rows("<tr><td>a<td rowspan=0>b</tr><tr><td>c</tr>") == [["a", "b"], ["c", "b"]]
    assert rows("<tr><td>a<td rowspan=9>b</tr><tr><td colspan=x>c</tr>") == [["a", "b"], ["c", "b"]]
    assert rows("<tr><th>a</tr><tr><th>b</tr>") == [["b"]]  # nothing but headings: only the first names the column
    assert rows("<thead><tr><th rowspan=5>h</tr></thead><tr><td>1</tr>") == [["1"]]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text("<>/ab=\"'&;#x0 tdrhmeailnkp!-\0\n", max_size=300).map(str.encode)))
def test_any_bytes_make_a_page(body):
    page = parse_page(body, "http://h.example/")
    assert all(normalize_url(link) == link for link in page.links)
    assert isinstance(decode(body)[0], str)
    try:
        parse_sitemap(body, "http://h.example/", 10_000)
    except ValueError as error:
        assert "http://h.example/" in str(error)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.text("abAZ09/.?&=#%;:@[]~ é医", max_size=60).map("http://h.example/".__add__))
def test_one_form_is_a_fixed_point(text):
    form = normalize_url(text, "http://h.example/a/b")
    assert form is None or (normalize_url(form) == form and form.isascii() and urlsplit(form).fragment == "")
