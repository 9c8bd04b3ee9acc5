"""Prompt files on web servers and in buckets."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from pipelines import image_sets, sources
from pipelines.sources import SourceError
from tests.pipelines.image_set import write_set


def values(url, **options):
    """All rows of a file, by default in pieces as a job reads them."""
    [source] = sources.find([url])
    return [row for piece in sources.cut(source, **options) for _, row in sources.read(piece)]


class _Sender(BaseHTTPRequestHandler):
    """Sends each file whole whatever part is asked for, with its length or in chunks."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        folder, chunked = self.server.folder, self.path.startswith("/chunked/")
        data = (folder / self.path.rpartition("/")[2]).read_bytes()
        self.send_response(200)
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(data)))))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data) if chunked else data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def sender(tmp_path, monkeypatch):
    """The address of one that knows the files of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sender)
    server.folder = tmp_path
    monkeypatch.setattr(server, "handle_error", lambda *_: None)  # of a client that waits for no file's end
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", ["whole", "chunked"])
@pytest.mark.parametrize("kind", ["tar", "bytes"])
def test_a_set_that_is_read_in_parts_is_refused_where_none_are_given(tmp_path, sender, how, kind):
    write_set(tmp_path, kind)
    [name, *_] = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SourceError, match=f"{name}: its web server gives no parts of files"):
        image_sets.find([f"{sender}/{how}/{name}"])


@pytest.mark.parametrize("how", ["whole", "chunked"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.parquet", "a.toml"])
def test_a_web_server_may_know_no_parts(tmp_path, sender, how, name):
    table = [{"prompt": f"a cat {i}"} for i in range(7)]
    lines = "".join(f"{row['prompt']}\n" for row in table)
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "a.csv").write_text(f"prompt\n{lines}")
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=4)
    (tmp_path / "a.toml").write_text(f"prompts = {[row['prompt'] for row in table]}")
    read = values(f"{sender}/{how}/{name}", rows=3)
    assert [row["prompt"] for row in read] == [row["prompt"] for row in table]


class _BucketFile(AbstractBufferedFile):
    """A file as fsspec's bucket filesystems give it, whose readline takes no limit."""

    def _fetch_range(self, start, end):
        return self.fs.content[start:end]


class _Bucket(AbstractFileSystem):
    protocol = "bucketlike"
    content = b"prompt,seed\na red circle,1\n" + "ein Kreis 円,2\n".encode() + b"x" * 9 + b",3\n"

    def info(self, path, **_):
        return {"name": path, "size": len(self.content), "type": "file"}

    def ls(self, path, detail=True, **_):
        return [self.info(path)] if detail else [path]

    def _open(self, path, mode="rb", **options):
        return _BucketFile(self, path, mode, size=len(self.content), block_size=7)


def test_a_csv_in_a_bucket_is_read_line_by_line():
    fsspec.register_implementation("bucketlike", _Bucket, clobber=True)
    read = values("bucketlike://b/prompts.csv")
    assert [row["prompt"] for row in read] == ["a red circle", "ein Kreis 円", "xxxxxxxxx"]
