#!/usr/bin/env python3
"""Checks what is in deploy/ with the programs that will read it, as far as they are on this machine.

    python3 -m pip install --requirement deploy/requirements.txt
    python3 deploy/check.py --loramux target/release/loramux

A check whose program is missing is skipped, and said to be; `--strict` counts that as failed. `make deploy-check`
installs what the registries have. Ends with 1 if a check failed.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
ROOT = DEPLOY.parent
CHART = DEPLOY / "helm/loramux"
EXAMPLES = sorted((DEPLOY / "helm/examples").glob("*.yaml"))
RULES = CHART / "files/rules.yml"
DASHBOARD = CHART / "files/dashboard.json"
# The chart's oldest, and the newest with schemas here.
KUBERNETES = ["1.30", "1.37"]
# Seconds that loramux takes after --drain-timeout at most: to give up what still runs (5), for the last bytes (5), and
# for the last spans (10).
AFTER_DRAIN = 20
# Options of `loramux serve` that the chart sets itself.
OWN_OPTIONS = {"model", "adapters", "store", "listen", "drain-timeout", "config", "help", "keys", "allow-anonymous",
               "tls-cert", "tls-key"}

CHECKS = []


class Skip(Exception):
    """Why a check cannot run here."""


def check(function):
    CHECKS.append(function)
    return function


def module(name):
    try:
        return __import__(name)
    except ImportError as e:
        raise Skip(f"Python package {name}: {e}") from e


def program(name, *folders):
    for folder in folders:
        if folder and (Path(folder) / name).exists():
            return str(Path(folder) / name)
    found = shutil.which(name)
    if not found:
        raise Skip(f"there is no {name}")
    return found


def run(*command, ok=True, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    output = done.stdout + done.stderr
    assert not ok or done.returncode == 0, f"{Path(str(command[0])).name} ends with {done.returncode}:\n{output}"
    return output


def yaml_file(path):
    return module("yaml").safe_load(Path(path).read_text())


def seconds(text):
    return int(re.fullmatch(r"(\d+)s?", str(text))[1])


def prometheus_folder(args):
    return Path(os.path.realpath(args.prometheus)).parent if args.prometheus else None


def loramux(args):
    if not args.loramux:
        raise Skip("no --loramux")
    return args.loramux


# Images


@check
def dockerfiles(args):
    """hadolint on the Dockerfiles."""
    # pip puts the program beside the package's folder, wherever that is.
    folders = [Path(p) / "bin" for p in sys.path if p]
    run(program("hadolint", Path(sys.executable).parent, *folders), DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda")


@check
def build_context(args):
    """Cargo reads the package from nothing but what the images copy."""
    cargo = program("cargo")
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for file in ("Dockerfile", "Dockerfile.cuda"):
        # Sources on this machine that the build stage copies, without the destination.
        copies = re.findall(r"^COPY (?!--)(.*) \S+$", (DEPLOY / file).read_text(), re.M)
        copied = sorted(" ".join(copies).split())
        assert copied == sorted(kept), f"{file} copies {copied}, .dockerignore keeps {sorted(kept)}"
    with tempfile.TemporaryDirectory() as folder:
        for path in kept:
            target = Path(folder) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, target)
        run(cargo, "metadata", "--locked", "--no-deps", "--format-version", "1", cwd=folder)
        for source in Path(folder, "src").rglob("*.rs"):
            for included in re.findall(r'include_(?:str|bytes)!\("([^"]+)"\)', source.read_text()):
                assert (source.parent / included).exists(), f"{source.name} includes {included}, which is not copied"


def certificate(folder):
    """A certificate for localhost and its key, as files in `folder`."""
    paths = Path(folder) / "cert.pem", Path(folder) / "key.pem"
    run(program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
        "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", paths[0], "-keyout", paths[1])
    return paths


@check
def entrances(args):
    """In an image's environment loramux starts only with keys or where it is told to do without, and the image's health
    check tells whether it is ready, with TLS whether it listens."""
    binary = loramux(args)
    texts = [(DEPLOY / file).read_text() for file in ("Dockerfile", "Dockerfile.cuda")]
    commands = {re.search(r"^HEALTHCHECK .*?CMD (\[.*?\])$", text.replace("\\\n", ""), re.M)[1] for text in texts}
    assert len(commands) == 1, commands
    probe = json.loads(*commands)
    assert probe[0] == "bash"
    [listen] = {re.search(r"LORAMUX_LISTEN=(\S+):8080", text)[1] for text in texts}
    with tempfile.TemporaryDirectory() as folder:
        cert, key = certificate(folder)
        keys = Path(folder) / "keys.toml"
        secret = run(binary, "keys", "new", keys, "ops", "--scopes", "infer,admin,metrics").strip()
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        base = inherited | {"LORAMUX_MODEL": "/nowhere", "LORAMUX_STORE": f"{folder}/store"}

        def start(**more):
            port = free_port()
            return port, base | {"LORAMUX_LISTEN": f"{listen}:{port}"} | more

        def refused(**more):
            return run(binary, "serve", ok=False, env=start(**more)[1], timeout=60)

        assert "--allow-anonymous" in refused()
        for known in ({"LORAMUX_ALLOW_ANONYMOUS": "true"}, {"LORAMUX_KEYS": str(keys)}):
            assert 'model "/nowhere" is nothing that exists here' in refused(**known), known
        for tls in ({}, {"LORAMUX_TLS_CERT": str(cert), "LORAMUX_TLS_KEY": str(key)}):
            port, env = start(LORAMUX_MODEL=str(ROOT / "tests/fixtures/tiny/llama/base"), LORAMUX_KEYS=str(keys), **tls)

            def health():
                return subprocess.run(probe, env=env, capture_output=True, timeout=30).returncode

            assert health() != 0, "healthy before it is started"
            log = Path(folder) / "loramux.log"
            with process([binary, "serve"], log, env=env) as server:
                for _ in range(300):
                    assert server.poll() is None, log.read_text()
                    if health() == 0:
                        break
                    time.sleep(0.1)
                else:
                    raise AssertionError(f"never healthy:\n{log.read_text()}")
                if not tls:
                    status = post(f"http://127.0.0.1:{port}/v1/generate", {"prompt": "t1"})
                    own = get(f"http://127.0.0.1:{port}/metrics", Authorization=f"Bearer {secret}")
                    assert status == 401 and "loramux_base_bytes" in own


@check
def runtime_libraries(args):
    """The binary needs no library that Debian's slim image lacks."""
    needed = re.findall(r"(\S+\.so[.\d]*)", run(program("ldd"), loramux(args)))
    extra = {Path(name).name for name in needed} - {
        "linux-vdso.so.1", "libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
    }
    assert not extra, extra


# Compose


@check
def compose(args):
    """The Compose files by compose_spec, their security by compose-lint, and what they mount."""
    compose_spec, yaml = module("compose_spec"), module("yaml")
    module("compose_lint")
    services = {}
    for file in ("compose.yaml", "compose.cuda.yaml"):
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (DEPLOY / file).read_text())
        text = re.sub(r"\$\{\w+:\?[^}]*\}", "89", text)
        compose_spec.PyCompose.from_yaml(text)
        services[file] = yaml.safe_load(text)["services"]
    run(sys.executable, "-m", "compose_lint", "check", "--fail-on", "high", DEPLOY / "compose.yaml")
    for name, service in services["compose.yaml"].items():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), f"{name} mounts {source}"
    for file in ("compose.yaml", "compose.cuda.yaml"):
        assert (ROOT / services[file]["loramux"]["build"]["dockerfile"]).exists(), file
    server = services["compose.yaml"]["loramux"]
    drain = seconds(server["environment"]["LORAMUX_DRAIN_TIMEOUT"])
    assert seconds(server["stop_grace_period"]) >= drain + AFTER_DRAIN
    target = yaml_file(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == ["loramux:8080"], target


# Prometheus and Grafana


@check
def rules(args):
    """promtool on the configuration and the alerts, and the alerts' unit tests."""
    promtool = program("promtool", prometheus_folder(args))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(DEPLOY / "prometheus/prometheus.yml", folder)
        shutil.copy(RULES, folder)
        run(promtool, "check", "config", Path(folder) / "prometheus.yml")
    run(promtool, "check", "rules", RULES)
    run(promtool, "test", "rules", DEPLOY / "prometheus/rules.test.yml")
    names = {rule["alert"] for rule in yaml_file(RULES)["groups"][0]["rules"]}
    tests = yaml_file(DEPLOY / "prometheus/rules.test.yml")["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    fired = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert names == fired == silent, f"untested: {names - fired} fire, {names - silent} do not"
    # A label of the target's, by which alerts are routed, is kept by all that are of a target.
    alerts = [(case["alertname"], alert["exp_labels"]) for case in cases for alert in case.get("exp_alerts", [])]
    unrouted = {name for name, labels in alerts if "namespace" not in labels}
    assert unrouted == {"LoramuxAbsent"}, unrouted


def node_faults(args, documents):
    """What checks/schemas.mjs finds in dashboards and custom resources."""
    if not args.modules or not Path(args.modules).exists():
        raise Skip("no --modules, the folder of npm's packages in deploy/checks/package.json")
    node = program("node")
    command = [node, str(DEPLOY / "checks/schemas.mjs"), str(Path(args.modules).resolve())]
    done = subprocess.run(command, input=json.dumps(documents), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@check
def dashboard(args):
    """The dashboard by Grafana's types, its panels apart from each other, and what provisions it."""
    board = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    cells = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        own = {(x, y) for x in columns for y in rows}
        assert not own & cells and place["x"] + place["w"] <= 24, f"{panel['title']} overlaps"
        cells |= own
    source = yaml_file(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert source["type"] == board["templating"]["list"][0]["query"] == "prometheus" and source["isDefault"]
    mounts = yaml_file(DEPLOY / "compose.yaml")["services"]["grafana"]["volumes"]
    folder = yaml_file(DEPLOY / "grafana/provisioning/dashboards/loramux.yaml")["providers"][0]["options"]["path"]
    assert any(mount.split(":")[1].startswith(folder + "/") for mount in mounts)
    node_faults(args, [board])


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return answer.read().decode()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def process(command, log, **options):
    with open(log, "w") as output:
        child = subprocess.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        yield child
    finally:
        child.terminate()
        child.wait()


def wait_for(url, child, log):
    for _ in range(300):
        assert child.poll() is None, Path(log).read_text()
        try:
            return get(url)
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer:\n{Path(log).read_text()}")


def dashboard_expressions():
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "30s")
            yield panel["title"], expr


def rule_parts(rule):
    """What an alert compares, side by side: what has data although nothing fires."""
    for side in re.split(r"\s+and on \([^)]*\)\s+", rule["expr"].strip()):
        yield re.sub(r"\s*(==|>)\s*[\d.]+$", "", side)


def labels_exported(metrics):
    """Labels of each series in the exposition text; a histogram's are those of its buckets."""
    exported = {}
    for name, labels in re.findall(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? \S+$", metrics, re.M):
        exported.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return exported


def check_names(where, expr, exported):
    """Every metric and every label in `expr` is one that loramux exports, and what vLLM exports too is loramux's."""
    assert not re.search(r'vllm:\w+\b(?!\{job="loramux")', expr), f"{where} takes vLLM for loramux: {expr}"
    bare = re.sub(r'"[^"]*"', '""', expr)
    names = [name for name in re.findall(r"[a-zA-Z_:][\w:]*", bare) if name.startswith(("loramux_", "vllm:"))]
    for name in names:
        assert name in exported, f"{where}: loramux exports no {name}"
    known = {"instance", "job"}.union(*(exported[name] for name in names))
    if "ALERTS" in bare:
        known |= {"alertname", "alertstate"}
    used = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*""', bare)
    for group in re.findall(r"\b(?:by|on|without)\s*\(([^)]*)\)", bare):
        used += re.findall(r"\w+", group)
    assert set(used) <= known, f"{where}: labels {set(used) - known} are not exported"


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as e:
        return e.code


def traffic(url, adapters, stop, statuses):
    """Requests of all kinds until `stop`: more than the queue has room for, some for adapters not in memory."""

    def client(number):
        turn = number
        while not stop.is_set():
            adapter = adapters[turn % len(adapters)]
            body = {"prompt": "t1 t2 t3", "max_tokens": 40, "ignore_eos": True}
            path = "/v1/completions" if turn % 2 else "/v1/generate"
            body |= {"model": adapter or "base"} if turn % 2 else {"adapter": adapter}
            statuses.append(post(url + path, body))
            turn += 1
            if turn % 10 == 0:
                statuses.append(post(url + "/v1/generate", {"prompt": "t1", "adapter": "no-such-adapter"}))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    return threads


@check
def live(args):
    """A real loramux under traffic, scraped by a real Prometheus with the shipped configuration and rules. Every
    expression of the dashboard, the rules and the metrics adapter is evaluated: none fails, and all have data."""
    binary, yaml = loramux(args), module("yaml")
    prometheus = program("prometheus", prometheus_folder(args))
    fixture = ROOT / "tests/fixtures/tiny/llama"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        folder = Path(folder)
        (folder / "adapters").mkdir()
        for name in ("adapter_all_linear", "adapter_qv_r4", "adapter_rslora_r8"):
            shutil.copytree(fixture / name, folder / "adapters" / name)
        port, log = free_port(), folder / "loramux.log"
        # One place in the batch and one in the queue, and memory for one or two of the three adapters.
        command = [binary, "serve", "--model", fixture / "base", "--adapters", folder / "adapters", "--store",
                   folder / "store", "--listen", f"127.0.0.1:{port}", "--max-sequences", 1, "--max-queue", 1,
                   "--kv-memory", "16MiB", "--adapter-memory", "64KiB"]
        server = stack.enter_context(process(command, log))
        url = f"http://127.0.0.1:{port}"
        wait_for(url + "/health/ready", server, log)

        config = yaml_file(DEPLOY / "prometheus/prometheus.yml")
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(RULES, folder)
        api = f"http://127.0.0.1:{free_port()}"
        log = folder / "prometheus.log"
        command = [prometheus, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                   f"--web.listen-address={api.removeprefix('http://')}"]
        watcher = stack.enter_context(process(command, log))
        wait_for(api + "/-/ready", watcher, log)

        def query(expr):
            try:
                answer = get(f"{api}/api/v1/query?query=" + urllib.parse.quote(expr))
            except urllib.error.HTTPError as e:
                raise AssertionError(f"{expr}\n{e.read().decode()}") from e
            return json.loads(answer)["data"]["result"]

        stop, statuses = threading.Event(), []
        threads = traffic(url, [None, "adapter_all_linear", "adapter_qv_r4", "adapter_rslora_r8"], stop, statuses)
        try:
            deadline = time.monotonic() + 60
            # Until each of the statuses has been seen in two scrapes.
            while time.monotonic() < deadline:
                time.sleep(1)
                if len(query('increase(loramux_requests_total{status=~"200|404|429"}[30s]) > 0')) >= 3:
                    break
        finally:
            time.sleep(3)
            exported = labels_exported(get(url + "/metrics"))
            alerts = yaml_file(RULES)["groups"][0]["rules"]
            states = json.loads(get(f"{api}/api/v1/rules"))["data"]["groups"][0]["rules"]
            expressions = list(dashboard_expressions())
            expressions += [(rule["alert"], part) for rule in alerts for part in rule_parts(rule)]
            results = {(where, expr): query(expr) for where, expr in expressions}
            adapter = yaml_file(DEPLOY / "prometheus/adapter.yml")["rules"][0]
            series = query(adapter["seriesQuery"])
            substitutes = {"<<.Series>>": "vllm:num_requests_waiting", "<<.LabelMatchers>>": 'job="loramux"',
                           "<<.GroupBy>>": "instance"}
            asked = re.sub(r"<<\.\w+>>", lambda found: substitutes[found[0]], adapter["metricsQuery"])
            scaled = query(asked)
            stop.set()
            for thread in threads:
                thread.join()
        assert {200, 404, 429} <= set(statuses), sorted(set(statuses))
        for where, expr in expressions + [("the metrics adapter", asked)]:
            check_names(where, expr, exported)
        # Nothing is absent, and no request failed in the server or was late.
        for (where, expr), result in results.items():
            empty = not result or all(sample["value"][1] == "NaN" for sample in result)
            expected = where in ("LoramuxAbsent", "LoramuxErrors", "LoramuxLate")
            assert empty == expected, f"{where}: {expr} gives {result}"
        assert len(states) == len(alerts)
        for state in states:
            assert state["health"] == "ok", f"{state['name']}: {state.get('lastError')}"
        assert len(series) == 1 and len(scaled) == 1, (series, scaled)
        print(f"    {len(statuses)} requests, {len(results)} expressions")


# systemd


@check
def unit(args):
    """systemd-analyze on the unit, alone and with the parts for GPUs and for keys, and its options by loramux."""
    analyze, binary = program("systemd-analyze"), loramux(args)
    text = (DEPLOY / "systemd/loramux.service").read_text()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loramux.service"
        path.write_text(text.replace("/usr/local/bin/loramux", os.path.abspath(binary)))
        complaints = run(analyze, "verify", "--man=no", path)
        assert not complaints, complaints
        run(analyze, "security", "--offline=yes", "--no-pager", "--threshold=15", path)
        drop_in = Path(folder) / "loramux.service.d"
        drop_in.mkdir()
        for part in ("cuda.conf", "access.conf"):
            shutil.copy(DEPLOY / "systemd" / part, drop_in)
            complaints = run(analyze, "verify", "--man=no", path)
            assert not complaints, complaints
            named = set(re.findall(r"\b(LORAMUX_\w+)=", (drop_in / part).read_text()))
            assert named <= set(re.findall(r"\[env: (\w+)=", run(binary, "serve", "--help"))), named
        config = DEPLOY / "systemd/loramux.toml"
        check_config(binary, config)
    drain = seconds(re.search(r"^drain-timeout = (\d+)$", config.read_text(), re.M)[1])
    assert seconds(re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)[1]) >= drain + AFTER_DRAIN


def check_config(binary, path):
    """loramux takes every option in the file: with a model that does not exist, that is all it complains about."""
    with tempfile.TemporaryDirectory() as store:
        environment = {"PATH": os.environ["PATH"], "LORAMUX_MODEL": "/nowhere", "LORAMUX_STORE": store,
                       "LORAMUX_LISTEN": f"127.0.0.1:{free_port()}"}
        output = run(binary, "serve", "--config", path, ok=False, env=environment, timeout=60)
    assert 'model "/nowhere" is nothing that exists here' in output, output


# nginx


@check
def nginx(args):
    """nginx on its configuration, with addresses in place of the replicas' names."""
    binary = args.nginx if args.nginx and os.path.exists(args.nginx) else program("nginx", "/usr/sbin")
    text = re.sub(r"loramux-\d:8080", "127.0.0.1:8080", (DEPLOY / "nginx/loramux.conf").read_text())
    with tempfile.TemporaryDirectory() as folder:
        kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        folders = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
        path = Path(folder) / "nginx.conf"
        path.write_text(f"pid {folder}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{folders}{text}}}\n")
        complaints = run(binary, "-t", "-q", "-e", "stderr", "-c", path)
        assert not complaints, complaints


# Kubernetes


def values_of(example):
    return yaml_file(example) if example else {}


def render(values, name="loramux"):
    helm, yaml = module("helm_python"), module("yaml")
    with helm.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=name, namespace="ml", is_install=True)
    texts = [text for file, text in sorted(files.items()) if not file.endswith("NOTES.txt")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def of_kind(documents, kind):
    return [document for document in documents if document["kind"] == kind]


def is_custom(document):
    return document["apiVersion"].split("/")[0] in ("monitoring.coreos.com", "gateway.networking.k8s.io")


@check
def chart(args):
    """Helm's own lint and templates on the chart and the examples; the manifests by Kubernetes' schemas, strictly, and
    by what pods of its restricted standard may do."""
    helm, validate = module("helm_python"), module("kubernetes_validate")
    for example in [None, *EXAMPLES]:
        for version in KUBERNETES:
            report = helm.lint(str(CHART), values_of(example), strict=True, kube_version=f"v{version}.0")
            faults = [m for m in report["messages"] if m["severity"] > 1]
            assert not faults and not report["errors"], (example, report)
        documents = render(values_of(example))
        for document in documents:
            for version in KUBERNETES if not is_custom(document) else []:
                validate.validate(document, version, strict=True)
        names = [(document["kind"], document["metadata"]["name"]) for document in documents]
        assert len(names) == len(set(names)), names
        check_pod(of_kind(documents, "StatefulSet")[0], documents)
        assert all(service["spec"]["type"] == "ClusterIP" for service in of_kind(documents, "Service"))
    options = ({"kv-memry": "1GiB"}, {"max-queue": "many"})
    watched = {"monitoring": {"serviceMonitor": {"enabled": True}}}
    for wrong in (*({"config": option} for option in options), {"replica": 2}, {"endpointLag": 0},
                  {"config": {"source": ["s3://bucket/prefix"]}}, {"allowAnonymous": False},
                  {"keys": {"existingSecret": "loramux-keys"}} | watched):
        try:
            render(wrong)
        except helm.HelmError:
            continue
        raise AssertionError(f"the chart takes {wrong}")
    documents = render({"keys": {"existingSecret": "loramux-keys"}, "allowAnonymous": True})
    assert "allow-anonymous" not in of_kind(documents, "ConfigMap")[0]["data"]["loramux.toml"]


def check_pod(workload, documents):
    template = workload["spec"]["template"]
    pod, container = template["spec"], template["spec"]["containers"][0]
    context = container["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["readOnlyRootFilesystem"] and context["capabilities"] == {"drop": ["ALL"]}
    assert context["allowPrivilegeEscalation"] is False and pod["automountServiceAccountToken"] is False
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert mounted == claims | volumes and not claims & volumes, (mounted, claims, volumes)
    # What the file says of files is mounted, and probes and services speak what the port does.
    config = of_kind(documents, "ConfigMap")[0]["data"]["loramux.toml"]
    for path in re.findall(r'^(?:keys|tls-cert|tls-key) = "(.*)/[^/]+"$', config, re.M):
        assert [mount for mount in container["volumeMounts"] if mount["mountPath"] == path and mount["readOnly"]], path
    scheme = "https" if "tls-cert" in config else "http"
    assert ("keys = " in config) != ("allow-anonymous = true" in config)
    [port] = container["ports"]
    assert port["name"] == scheme
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == scheme and container[probe]["httpGet"]["scheme"] == scheme.upper()
    for service in of_kind(documents, "Service"):
        assert [(p["name"], p["targetPort"]) for p in service["spec"]["ports"]] == [(scheme, scheme)]
    for policy in of_kind(documents, "NetworkPolicy"):
        assert policy["spec"]["ingress"][0]["ports"][0]["port"] == scheme
    # Everything that names the pods by labels means these.
    labels = template["metadata"]["labels"].items()
    for kind, path in (("Service", ["selector"]), ("PodDisruptionBudget", ["selector", "matchLabels"]),
                       ("NetworkPolicy", ["podSelector", "matchLabels"]), ("StatefulSet", ["selector", "matchLabels"])):
        for document in of_kind(documents, kind):
            selector = document["spec"]
            for key in path:
                selector = selector[key]
            assert selector.items() <= labels, (kind, selector)
    for monitor in of_kind(documents, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        assert len([s for s in of_kind(documents, "Service") if wanted <= s["metadata"]["labels"].items()]) == 1
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint["port"] == scheme == endpoint.get("scheme", "http")
        assert ("authorization" in endpoint) == ("keys = " in config)
    drain = seconds(re.search(r"^drain-timeout = (\d+)$", config, re.M)[1])
    lag = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= lag + drain + AFTER_DRAIN
    for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
        assert "replicas" not in workload["spec"] and scaler["spec"]["scaleTargetRef"]["kind"] == "StatefulSet"
        asked = scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
        assert asked == yaml_file(DEPLOY / "prometheus/adapter.yml")["rules"][0]["name"]["as"]


@check
def chart_options(args):
    """The chart's schema has every option of `loramux serve`, and loramux takes the file that comes of them."""
    binary = loramux(args)
    options = set(re.findall(r"^ +(?:-\w, )?--([a-z-]+)", run(binary, "serve", "--help"), re.M)) - OWN_OPTIONS
    known = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]["properties"]
    assert options == set(known), f"lacks {options - set(known)}; no options are {set(known) - options}"
    config = {"adapter-memory": "2GiB", "allow-local-paths": True, "allow-origin": ["https://app.example"],
              "allow-uploaded-templates": False, "audit-log": "/var/lib/loramux/audit.jsonl", "device": "cpu",
              "dtype": "auto", "gpu-memory-utilization": 0.85, "kv-memory": 1 << 30,
              "max-batch-tokens": 1024, "max-prefill-tokens": 256, "max-queue": 2_000_000, "max-sequences": 64, "max-upload": "512MiB",
              "quantize": "q8", "request-timeout": 300, "served-model-name": ["tgi"],
              "source": ["s3://bucket/adapters"], "source-cache": "1GiB", "source-refresh": 2, "tenant-slowdown": 1.5, "threads": 0}
    config = {key: config.get(key, True) for key in known}
    volume = {"emptyDir": {}}
    values = {"config": config, "adapters": {"volume": volume}, "drainTimeout": 1}
    secrets = {name: {"existingSecret": f"loramux-{name}"} for name in ("keys", "tls")}
    with tempfile.TemporaryDirectory() as folder:
        cert, key = certificate(folder)
        run(binary, "keys", "new", Path(folder) / "keys.toml", "ops", "--scopes", "infer")
        # Where the pod has these files they are here.
        here = {"/etc/loramux-keys": folder, "/etc/loramux-tls/tls.crt": cert, "/etc/loramux-tls/tls.key": key,
                "/var/lib/loramux": folder}
        for more in ({}, secrets):
            text = of_kind(render(values | more), "ConfigMap")[0]["data"]["loramux.toml"]
            assert all(there in text for there in here) or not more, text
            for there, path in here.items():
                text = text.replace(there, str(path))
            path = Path(folder) / "loramux.toml"
            path.write_text(text)
            check_config(binary, path)


@check
def custom_resources(args):
    """The chart's and the gateway's custom resources by their definitions, and that they mean the chart's pods."""
    documents = [document for example in EXAMPLES for document in render(values_of(example))]
    yaml = module("yaml")
    gateway = list(yaml.safe_load_all((DEPLOY / "gateway/routes.yaml").read_text()))
    pool = yaml_file(DEPLOY / "gateway/inferencepool.yaml")
    values = yaml_file(DEPLOY / "gateway/inferencepool.values.yaml")
    labels = of_kind(render({}), "StatefulSet")[0]["spec"]["template"]["metadata"]["labels"]
    selector = values["inferencePool"]["modelServers"]["matchLabels"]
    assert selector.items() <= labels.items() and selector == pool["spec"]["selector"]["matchLabels"]
    assert values["inferencePool"]["targetPorts"] == pool["spec"]["targetPorts"] == [{"number": 8080}]
    route, objective = gateway
    routed = [route["spec"]["rules"][0]["backendRefs"][0]["name"], objective["spec"]["poolRef"]["name"]]
    assert routed == [pool["metadata"]["name"]] * 2, routed
    picker = values["inferenceExtension"]
    profile = yaml.safe_load(picker["pluginsCustomConfig"][picker["pluginsConfigFile"]])
    plugins = {plugin["type"] for plugin in profile["plugins"]}
    assert {used["pluginRef"] for used in profile["schedulingProfiles"][0]["plugins"]} <= plugins
    node_faults(args, [document for document in documents + gateway if is_custom(document)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loramux", help="the built program")
    parser.add_argument("--prometheus", help="the program prometheus, with promtool beside it; else those on the PATH")
    parser.add_argument("--nginx", help="the program nginx; else the one on the PATH")
    parser.add_argument("--modules", help="folder node_modules with what checks/package.json names")
    parser.add_argument("--strict", action="store_true", help="a skipped check fails")
    parser.add_argument("checks", nargs="*", help="only these: " + ", ".join(c.__name__ for c in CHECKS))
    args = parser.parse_args()
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for function in CHECKS:
        if args.checks and function.__name__ not in args.checks:
            continue
        try:
            function(args)
            counts["passed"] += 1
            print(f"ok    {function.__name__}")
        except Skip as reason:
            counts["skipped"] += 1
            print(f"SKIP  {function.__name__}: {reason}")
        except Exception as e:
            counts["failed"] += 1
            print(f"FAIL  {function.__name__}: {type(e).__name__}: {e}")
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["failed"] or args.strict and counts["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
