"""A headless Chromium, driven over its own protocol: what a page asks for, says in its console, and holds."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--disable-extensions", "--remote-debugging-port=0", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


def find_browser() -> str | None:
    "The program, if one is installed."
    return next((p for p in map(shutil.which, NAMES) if p), None)


class Browser:
    "One tab: `open` a page, `eval` JavaScript in it, and read `requests` and `errors` since the page was opened."

    def __init__(self) -> None:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [find_browser() or "chromium", *FLAGS, f"--user-data-dir={self.profile.name}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.ids = itertools.count(1)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.socket = websocket.create_connection(self._address(), suppress_origin=True, timeout=30)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(10)
        self.profile.cleanup()

    def open(self, url: str, until: str = "true", seconds: float = 15) -> None:
        "Open a page, wait until it has loaded and until the JavaScript condition holds."
        self.eval("window.leaving = true")
        self.requests, self.errors = [], []
        self.call("Page.navigate", url=url)
        ready = "!window.leaving && performance.getEntriesByType('navigation')[0]?.loadEventEnd > 0"
        end = time.monotonic() + seconds
        while not self.eval(f"{ready} && !!({until})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{url}: not true within {seconds} s: {until}; console: {self.errors}")
            time.sleep(0.02)

    def eval(self, script: str) -> Any:
        "Value of a JavaScript expression."
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        "Give the page another window."
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, on: bool) -> None:
        "Let the system prefer dark or light pages."
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self) -> str:
        "The window as a PNG, base64."
        return self.call("Page.captureScreenshot", format="png")["data"]

    def call(self, method: str, **params: Any) -> dict:
        "Send one command, and note events until its answer comes."
        number = next(self.ids)
        message = {"id": number, "method": method, "params": params}
        if hasattr(self, "session") and not method.startswith("Target."):
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _note(self, event: str, about: dict) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Network.loadingFailed" and not about.get("canceled"):
            self.errors.append(f"a request failed: {about['errorText']}")
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"].get("exception", {}).get("description", about)))
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.errors.append(str([a.get("value", a.get("description")) for a in about["args"]]))
        elif event == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(about["entry"]["text"])

    def _address(self) -> str:
        note, end = Path(self.profile.name) / "DevToolsActivePort", time.monotonic() + 30
        while not (note.exists() and len(lines := note.read_text().split("\n")) > 1 and lines[1]):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the browser did not start; run it by hand to see why")
            time.sleep(0.05)
        return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
