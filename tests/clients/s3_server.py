"""An S3 server (moto) that checks signatures, and someone who puts adapters into its bucket.

Prints {"url", "key", "secret"}, then does what each line of its input says: `put NAME FOLDER`, `put-file NAME PATH`,
`remove NAME`, and prints `ok`.
"""

import json
import logging
import sys
import urllib.request
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

BUCKET, PREFIX = "adapters", "prod"

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
key = iam.create_access_key(UserName="writer")["AccessKey"]
# From here on a request without the key's signature is refused.
switch = urllib.request.Request(f"{url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
urllib.request.urlopen(switch).close()
s3 = client("s3", key["AccessKeyId"], key["SecretAccessKey"])
s3.create_bucket(Bucket=BUCKET)
print(json.dumps({"url": url, "key": key["AccessKeyId"], "secret": key["SecretAccessKey"]}), flush=True)
for line in sys.stdin:
    what, name, *path = line.rstrip("\n").split(" ", 2)
    if what == "put":
        for file in sorted(Path(path[0]).iterdir()):
            s3.upload_file(str(file), BUCKET, f"{PREFIX}/{name}/{file.name}")
    elif what == "put-file":
        s3.upload_file(path[0], BUCKET, f"{PREFIX}/{name}/{Path(path[0]).name}")
    elif what == "remove":
        objects = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{PREFIX}/{name}/")["Contents"]
        s3.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": o["Key"]} for o in objects]})
    else:
        raise ValueError(line)
    print("ok", flush=True)
