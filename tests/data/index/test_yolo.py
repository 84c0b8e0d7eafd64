import numpy as np
import pytest

from data.index.columns import Entries, Texts
from data.index.records import Labels, Row
from data.index.rows import MAX_ROWS, _plain_rows, parse_row, read_rows, split_rows
from utils.errors import UserError
from utils.images import ImageError

BOX = "0 0.5 0.5 0.25 0.5\n"  # of a 64x48 image: 24 12 40 36


def test_boxes_and_polygons_by_hand(scan, yolo_set):
    text = "2 0.5 0.5 0.25 0.5\n1 .25 .25 .75 .25 .5 .75\n1 0.125 0.25 0.25 0.5"
    index = scan(yolo_set({"a.jpg": text}))
    (record,) = index.records
    np.testing.assert_array_equal(
        record.boxes, [[24, 12, 40, 36], [16, 12, 48, 36], [0, 0, 16, 24]]
    )
    np.testing.assert_array_equal(record.labels, [2, 1, 1])
    np.testing.assert_array_equal(record.areas, [16 * 24, 32 * 24, 16 * 24])
    np.testing.assert_array_equal(record.segments[1], [[16, 12], [48, 12], [32, 36]])
    assert record.segments[::2] == (None, None)
    assert (record.height, record.width) == (48, 64)
    assert not record.crowd.any()
    columns = (record.boxes, record.labels, record.crowd, record.areas)
    assert [column.dtype for column in columns] == [np.float32, np.int64, bool, np.float32]
    assert index.category_ids == (0, 1, 2)


@pytest.mark.parametrize(
    "text",
    [
        b"0 .5 .5 .25 .5\r\n1 .5 .5 .5 .5\r\n",
        b"\xef\xbb\xbf0 .5 .5 .25 .5\n1 .5 .5 .5 .5",
        b"\n  0\t.5 .5 .25 .5  \n\n1 .5 .5 .5 .5\n\n",
        b"0 .5 .5 .25 .5\r1 .5 .5 .5 .5\r",
        b"0.0 5e-1 .5 .25 .5\n1 .5 .5 .5 .5\n",
    ],
    ids=["CRLF", "BOM", "blank lines", "CR", "number forms"],
)
def test_ways_to_write_text(scan, yolo_set, text):
    index = scan(yolo_set({"a.jpg": text}))
    np.testing.assert_array_equal(index.records[0].boxes, [[24, 12, 40, 36], [16, 12, 48, 36]])
    assert not index.problems


BAD_ROWS = {
    "class too high": ("3 .5 .5 .1 .1", "class 3; the data set has the classes 0 to 2"),
    "class negative": ("-1 .5 .5 .1 .1", "class -1"),
    "class not whole": ("0.7 .5 .5 .1 .1", "class 0.7 is not a whole number"),
    "class is text": ("cat .5 .5 .1 .1", "'cat' is not a number"),
    "negative width": ("0 .5 .5 -.1 .1", "width -0.1 and height 0.1 must be positive"),
    "no area": ("0 .5 .5 0 0", "width 0 and height 0 must be positive"),
    "centre outside": ("0 1.2 .5 .1 .1", "centre (1.2, 0.5)"),
    "pixels": ("0 320 240 64 48", "fractions of 0 to 1"),
    "inf": ("0 .5 .5 inf .1", "nan and inf"),
    "nan": ("0 nan .5 .1 .1", "nan and inf"),
    "too large for a float": ("0 1e999 .5 .1 .1", "nan and inf"),
    "commas": ("0,.5,.5,.1,.1", "commas"),
    "6 columns": ("0 .5 .5 .1 .1 .9", "6 columns (a prediction with its confidence?)"),
    "odd polygon": ("0 .1 .1 .2 .2 .3 .3 .4", "8 columns"),
    "polygon in pixels": ("0 10 10 20 10 20 20", "fractions of 0 to 1"),
    "polygon with nan": ("0 .1 .1 nan .2 .3 .3", "nan and inf"),
    "polygon of inf": ("0 inf .1 inf .2 .3 .3", "nan and inf"),
    "huge polygon": ("0 -1e308 .1 1e308 .2 .3 .3", "fractions of 0 to 1"),
    "flat polygon": ("0 .1 .1 .2 .1 .3 .1", "must be positive"),
}


@pytest.mark.parametrize(("row", "cause"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_left_out_and_named_by_line(scan, yolo_set, tmp_path, row, cause, capsys):
    index = scan(yolo_set({"a.jpg": f"{BOX}{row}\n1 .5 .5 .5 .5\n", "b.jpg": BOX}))
    (problem,) = index.problems
    assert problem.where == str(tmp_path / "set" / "labels" / "train" / "a.txt") + ":2"
    assert cause in problem.cause
    assert [record.labels.tolist() for record in index.records] == [[0, 1], [0]]
    assert index.skipped("row") == 1
    assert problem.text in capsys.readouterr().err


def test_an_image_with_bad_rows_only_is_not_background(scan, yolo_set):
    index = scan(yolo_set({"a.jpg": "3 .5 .5 .1 .1", "b.jpg": BOX}))
    assert [record.path.name for record in index.records] == ["b.jpg"]
    assert [problem.kind for problem in index.problems] == ["row", "image"]
    assert index.backgrounds == 0


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (BOX.encode("utf-16"), "not UTF-8 text"),
        (b"0 .5 .5 \0 .1", "binary data"),
        (b"0 .5 .5 .1 .1\n" * (MAX_ROWS + 1), f"{MAX_ROWS + 1} rows; more than 10000"),
    ],
    ids=["UTF-16", "zero byte", "too many rows"],
)
def test_an_unreadable_label_file_spoils_its_image_once(scan, yolo_set, content, cause):
    file = yolo_set({"a.jpg": content, "b.jpg": BOX})
    index = scan(file)
    (problem,) = index.problems
    assert problem.where.endswith("labels/train/a.txt")
    assert cause in problem.cause
    assert [record.path.name for record in index.records] == ["b.jpg"]
    (file.parent / "set" / "images" / "train" / "a.jpg").write_bytes(b"")
    index = scan(file)
    assert [problem.kind for problem in index.problems] == ["image", "note"]
    assert index.skipped() == 1
    assert len(split_rows(b"0 .5 .5 .1 .1\n" * MAX_ROWS)) == MAX_ROWS


def test_boxes_over_the_edge_are_clipped_and_counted(scan, yolo_set):
    text = "0 .9 .5 .4 .5\n1 .5 .5 1.0 1.0\n2 -0.0002 .5 .5 .5\n0 .2 .2 .9 .2 .6 1.1\n"
    index = scan(yolo_set({"a.jpg": text + "0 .9000005 .5 .2 .2\n"}))  # rounding is not counted
    expected = [[44.8, 12, 64, 36], [0, 0, 64, 48], [0, 12, 15.9872, 36], [12.8, 9.6, 57.6, 48]]
    np.testing.assert_allclose(index.records[0].boxes[:4], expected, rtol=1e-6)
    assert index.records[0].segments[3][2].tolist() == pytest.approx([38.4, 48])
    assert index.clipped == 3
    assert not index.problems


def test_duplicates_are_removed_and_counted(scan, yolo_set):
    polygon = "0 .2 .2 .9 .2 .6 .8\n"
    text = BOX + "1" + BOX[1:] + BOX + polygon + BOX + polygon
    index = scan(yolo_set({"a.jpg": text, "b.jpg": BOX}))
    assert [record.labels.tolist() for record in index.records] == [[0, 1, 0], [0]]
    assert [item is None for item in index.records[0].segments] == [True, True, False]
    assert index.duplicates == 3


def test_missing_and_empty_labels_are_background(scan, yolo_set):
    index = scan(yolo_set({"a.jpg": BOX, "b.jpg": None, "c.jpg": "", "d.jpg": "\n \n"}))
    assert (len(index), index.boxes, index.backgrounds) == (4, 1, 3)
    assert index.records[1].boxes.shape == (0, 4)


def test_a_label_path_that_is_a_folder_stops(scan, yolo_set):
    file = yolo_set({"a.jpg": BOX, "b.jpg": None})
    (file.parent / "set" / "labels" / "train" / "b.txt").mkdir()
    with pytest.raises(UserError, match=r"labels/train/b\.txt: is a folder"):
        scan(file)


def test_ids_are_stems_or_paths(scan, tmp_path, write_image, yaml_file):
    for name in ("x/000012.jpg", "x/cat.jpg", "x/same.jpg", "y/same.jpg", "x/1.jpg", "y/01.jpg"):
        write_image(tmp_path / name)
    ids = [record.image_id for record in scan(yaml_file("train: [x, y]\nnames: [a]\n")).records]
    assert ids == [12, "x/1.jpg", "cat", "x/same.jpg", "y/01.jpg", "y/same.jpg"]


def test_list_files_and_labels_in_the_same_folder(scan, tmp_path, write_image, yaml_file):
    write_image(tmp_path / "pics" / "a b #1.jpg").with_suffix(".txt").write_text(BOX)
    write_image(tmp_path / "images" / "c.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "c.txt").write_text("1" + BOX[1:])
    lists = tmp_path / "lists"
    lists.mkdir()
    text = f"../pics/a b #1.jpg\r\n\r\n{tmp_path}/images/c.png\r\n../pics/gone.jpg\r\n../pics/a b #1.jpg\n"
    (lists / "train.txt").write_text("\ufeff" + text)
    index = scan(yaml_file("train: [lists/train.txt, images]\nnames: [a, b]\n"))
    assert [record.path.name for record in index.records] == ["a b #1.jpg", "c.png"]
    assert [record.labels.tolist() for record in index.records] == [[0], [1]]
    where = [problem.where for problem in index.problems]
    assert where == [
        f"{lists}/train.txt:5",
        str(tmp_path / "images" / "c.png"),
        str(tmp_path / "pics" / "gone.jpg"),
    ]
    assert index.skipped() == 1


def test_last_part_images_is_replaced(scan, tmp_path, write_image, yaml_file):
    write_image(tmp_path / "images" / "set" / "images" / "deep" / "a.jpg")
    labels = tmp_path / "images" / "set" / "labels" / "deep"
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text(BOX)
    assert scan(yaml_file("path: images/set\ntrain: images\nnames: [a]\n")).boxes == 1


def test_folders_come_in_order_and_linked_ones_once(scan, tmp_path, write_image, yaml_file):
    for name in "fcaebd":
        write_image(tmp_path / "train" / name / "a.jpg")
    write_image(tmp_path / "real" / "a.jpg")
    (tmp_path / "train" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "real")
    index = scan(yaml_file("train: train\nnames: [a]\n"))
    names = [record.path.parent.name for record in index.records]
    assert names == ["a", "b", "c", "d", "e", "f", "link"]
    assert not index.problems


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("nowhere", "d.yaml:2: train: {}: no such folder or list file"),
        ("list.csv", "d.yaml:2: train: {}: neither a folder nor a list file (.txt)"),
        (
            "c.json",
            "d.yaml:2: train: {}: a COCO JSON needs the folder of its images: {{images: DIR,",
        ),
        ("x" * 300, "d.yaml:2: train: {}: File name too long"),
        ("bad.txt", "{}: not a list of image paths: 'utf-8' codec"),
        ("zero.txt", "{}: not a list of image paths: it holds zero bytes"),
    ],
)
def test_paths_that_are_no_splits(scan, tmp_path, value, cause, yaml_file):
    (tmp_path / "list.csv").write_text("a.jpg")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfea")
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    with pytest.raises(UserError) as error:
        scan(yaml_file(f"names: [a]\ntrain: {value}\n"))
    assert cause.format(tmp_path / value) in str(error.value)


def test_the_lists_of_cvat_start_at_data(scan, tmp_path, write_image, yaml_file):
    write_image(tmp_path / "images" / "train" / "a.jpg")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "a.txt").write_text(BOX)
    (tmp_path / "train.txt").write_text("data/images/train/a.jpg\n")
    file = yaml_file("names:\n  0: cat\npath: .\ntrain: train.txt\n", "data.yaml")
    (record,) = scan(file.parent).records
    assert record.boxes.tolist() == [[24, 12, 40, 36]]


def test_labels_in_bulk_equal_those_line_by_line():
    """Boxes and polygons of many files at once, to the last bit; odd files among them as alone."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(60):
        lines = []
        for _ in range(rng.integers(0, 5)):
            size, points = rng.uniform(0.01, 0.4, 2), rng.uniform(0, 1, 2 * rng.integers(3, 9))
            box = [*rng.uniform(0.2, 0.8, 2), *size]
            numbers = box if rng.random() < 0.5 else points
            lines.append(f"{rng.integers(0, 3)} " + " ".join(f"{v:.7g}" for v in numbers))
        contents.append(rng.choice(["\n", "\r\n", "\n\n"]).join(lines).encode())
    count = len(contents)
    texts = Texts.of(map(str, range(count)))
    entries = Entries(texts, texts, np.ones(count, bool), np.zeros((count, 2), int), texts)
    names, problems = ("a", "b", "c"), []
    bulk = _plain_rows(range(count), contents, 3)
    rows = [
        Row(i, *parse_row(columns, 3)[:2], number, parse_row(columns, 3)[2])
        for i, content in enumerate(contents)
        for number, columns in split_rows(content)
    ]
    assert len(rows) > 80
    for name, column in vars(Labels.of(rows)).items():
        np.testing.assert_array_equal(getattr(bulk, name), column, name)
        assert getattr(bulk, name).dtype == column.dtype
    odd = {7: b"0 .5 .5 .1 .1\n0 1.2.3 .5 .1 -\n", 30: ImageError("locked"), 31: b"9 .5 .5 1 1"}
    mixed = [odd.get(i, content) for i, content in enumerate(contents)]
    found = read_rows(range(count), entries, names, problems, mixed)
    for name, column in vars(Labels.of([r for r in rows if r.image not in odd])).items():
        if name not in {"points", "starts"}:
            np.testing.assert_array_equal(getattr(found, name)[found.image != 7], column, name)
    assert [(p.where, p.image) for p in problems] == [("7:2", 7), ("30", 30), ("31:1", 31)]
