"""Servers and programs that are measured: started, asked over HTTP, and stopped."""

import contextlib
import http.client
import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class Server:
    """What answers at an address: `host:port`."""

    def __init__(self, address, process=None):
        self.address = address
        self.process = process
        self.ready = None  # Seconds from its start until it was ready.
        self.key = None  # Its API key, where it asks for one.

    def request(self, method, path, body=None):
        """Status and bytes of the answer."""
        connection = http.client.HTTPConnection(self.address, timeout=600)
        try:
            text = None if body is None else json.dumps(body)
            headers = {"content-type": "application/json"}
            if self.key:
                headers["authorization"] = f"Bearer {self.key}"
            connection.request(method, path, text, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path):
        return self._answer("GET", path)

    def post(self, path, body):
        return json.loads(self._answer("POST", path, body))

    def _answer(self, method, path, body=None):
        status, answer = self.request(method, path, body)
        if status != 200:
            raise RuntimeError(f"{path}: {status} {answer[:500]}")
        return answer

    def answers(self, path):
        try:
            return self.request("GET", path)[0] == 200
        except OSError:
            return False

    def metric(self, name):
        """A number of loramux's metrics, by its name with its labels."""
        lines = self.get("/metrics").decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    def resident(self):
        """Bytes of memory in use."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def started(command, port, ready, log):
    """The server that `command` starts on `port`, from when `ready` answers 200 to the end of the block."""
    start = time.monotonic()
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            server = Server(f"127.0.0.1:{port}", process)
            while not server.answers(ready):
                if process.poll() is not None or time.monotonic() > start + 300:
                    raise RuntimeError(f"{shlex.join(command)} does not answer; see {log}")
                time.sleep(0.01)
            server.ready = time.monotonic() - start
            yield server
        finally:
            process.terminate()


def loramux(args, model, folders, options):
    """`args.loramux serve` on a CPU with the adapters in `folders`; `args.work` holds its store and its log."""
    port = free_port()
    command = [str(args.loramux), "serve", "--model", str(model), "--device", "cpu", "--listen", f"127.0.0.1:{port}"]
    command += ["--store", str(args.work / "store"), *options]
    for folder in folders:
        command += ["--adapters", str(folder)]
    return started(command, port, "/health/ready", args.work / "loramux.log")


def output(command):
    """What a command writes to stdout."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr}")
    return done.stdout


def script(main):
    """Runs it. A signal to end stops its servers too, and errors are told without a trace."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
