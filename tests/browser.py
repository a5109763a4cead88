"""A real browser for tests of pages: headless Chromium over its debugging pipe, by the standard library alone."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
ANSWER_WITHIN = 60.0  # seconds, on a busy machine
# Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
LAUNCH = (
    "import os, sys\n"
    "ends = [os.dup(os.dup(os.dup(int(end)))) for end in sys.argv[1:3]]\n"
    "os.dup2(ends[0], 3), os.dup2(ends[1], 4)\n"
    "os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """One Chromium with one tab."""

    def __init__(self, program, profile):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--hide-scrollbars", "about:blank"]
        read, self.commands = os.pipe()
        self.answers, write = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(read), str(write), program, *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(read, write), **quiet)
        os.close(read)
        os.close(write)
        self.number, self.buffer, self.session = 0, b"", None
        tabs = self.call("Target.getTargets")["targetInfos"]
        target = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method, **parameters):
        """Sends a command and waits for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {} if self.session is None else {"sessionId": self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda m: m.get("id") == self.number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _wait(self, wanted):
        end = time.monotonic() + ANSWER_WITHIN
        while True:
            while b"\0" not in self.buffer:
                ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
                part = os.read(self.answers, 1 << 16) if ready else b""
                assert part, "the browser does not answer"
                self.buffer += part
            line, self.buffer = self.buffer.split(b"\0", 1)
            message = json.loads(line)
            if wanted(message):
                return message

    def open(self, path, width=1000, height=900, dark=False, phone=False):
        """Shows a file at this size and in this theme."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=path.as_uri())
        self._wait(lambda m: m.get("method") == "Page.loadEventFired")

    def run(self, script):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def click(self, element):
        """Clicks with the mouse in the middle of what a JavaScript expression finds."""
        self.run(f"({element}).scrollIntoView({{block: 'center'}})")
        place = self.run(f"({element}).getBoundingClientRect().toJSON()")
        where = {"x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def screenshot(self, path):
        """The whole page as a PNG."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def close(self):
        """Ends the browser, as the end of its commands does."""
        os.close(self.commands)
        self.process.wait(ANSWER_WITHIN)
        os.close(self.answers)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium here; Debian's is: apt-get install chromium")
    running = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()
