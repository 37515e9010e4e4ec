"""Maps of points with classes in colour."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_interp.render.color import BACKGROUND
from lightning_interp.render.scatter import LIMIT, class_colors, scatter, scatter_frame
from lightning_interp.render.text import LINE


def cloud(count, seed=0, spread=0.5):
    return np.random.default_rng(seed).normal(size=(count, 2)) * spread


def where(picture, color):
    """Rows and columns of the pixels that are near to a colour."""
    return np.nonzero(np.abs(picture.astype(int) - color).max(axis=-1) < 12)


@given(
    panels=st.sampled_from([1, 2, 3, 5, 10]),
    count=st.integers(0, 40),
    classes=st.integers(1, 30),
    note=st.sampled_from(["", "a"]),
)
@settings(max_examples=12, deadline=None)
def test_scatter_fits_a_card_and_is_near_to_a_square(panels, count, classes, note):
    """320 pixels wide, and no side more than twice the other; with no point at all too."""
    picture = scatter([("map", cloud(count))] * panels, np.arange(count) % classes, note=note)
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (320, 3)
    assert 160 <= picture.shape[0] <= 640


def test_scatter_has_each_point_where_its_coordinates_say_with_the_second_axis_upwards():
    """Four points in four quadrants, in a frame without text."""
    places = {0: (-1.0, -0.5), 1: (1.0, -0.5), 2: (-1.0, 0.5), 3: (1.0, 0.5)}
    picture = scatter_frame(np.array(list(places.values())), np.arange(4), side=200)
    for label, color in class_colors(np.arange(4)).items():
        rows, columns = where(picture, color)
        x, y = places[label]
        assert columns.mean() == pytest.approx(100 + 100 * x / LIMIT, abs=7)
        assert rows.mean() == pytest.approx(100 - 100 * y / LIMIT, abs=7)


def test_scatter_has_equal_axes():
    """As far to the right as upwards."""
    picture = scatter_frame(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1]), side=200)
    right, up = (where(picture, color) for color in class_colors(np.array([0, 1])).values())
    assert right[1].mean() - 100 == pytest.approx(100 - up[0].mean(), abs=1.1)


def test_scatter_shows_points_outside_at_the_edge_with_another_shape():
    """However far they are, and a triangle covers less than a disc of the same reach."""
    inside, outside = (
        len(where(scatter_frame(np.array([[x, 0.0]]), np.array([0]), side=200), (41, 169, 255))[0])
        for x in (LIMIT, 50.0)
    )
    assert 0 < outside != inside
    far = scatter_frame(np.array([[1e300, 0.0]]), np.array([0]), side=200)
    assert where(far, (41, 169, 255))[1].min() > 180


def test_scatter_leaves_out_points_that_are_not_finite():
    """And the others are where they would be without them."""
    points = np.stack(np.meshgrid(np.linspace(-1, 1, 6), np.linspace(-1, 1, 5)), axis=-1).reshape(-1, 2)
    labels = np.arange(30) % 3
    points[[2, 5]], points[7, 1] = np.nan, np.inf
    kept = np.isfinite(points).all(axis=1)
    assert np.array_equal(scatter_frame(points, labels), scatter_frame(points[kept], labels[kept]))
    nothing = scatter_frame(np.full((4, 2), np.nan), np.arange(4))
    assert (nothing == BACKGROUND).all()


def test_scatter_writes_the_name_of_each_class_near_its_points():
    """The picture differs from that of another name only there."""
    points = np.concatenate([cloud(40, 1, 0.05) - 1.0, cloud(40, 2, 0.05) + 1.0])
    labels = np.repeat([0, 1], 40)
    first, second = (scatter([("", points)], labels, names=["cat", name]) for name in ("dog", "ant"))
    rows, columns = np.nonzero((first != second).any(axis=-1))
    assert 200 < columns.min() < columns.max() < 300
    assert 20 < rows.min() < rows.max() < 120
    unnamed = scatter([("", points)], labels)
    assert np.array_equal(unnamed, scatter([("", points)], labels, names=["0", "1"]))
    assert np.array_equal(unnamed, scatter([("", points)], labels, names=["0"]))


def test_scatter_names_of_classes_in_one_place_do_not_cover_one_another():
    """The light pixels of text are as many as when the classes stand apart."""
    apart = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    names = ["wwww"] * 4
    blank = [" "] * 4
    counts = [
        (scatter([("", p)], np.arange(4), names=names) != scatter([("", p)], np.arange(4), names=blank)).any(-1).sum()
        for p in (apart, np.zeros((4, 2)))
    ]
    assert counts[1] > 0.85 * counts[0]


def test_scatter_rings_marked_points():
    """White pixels around them, and around no other."""
    points, labels = np.array([[-1.0, 0.0], [1.0, 0.0]]), np.array([0, 0])
    plain = scatter([("", points)], labels, marked=np.array([False, False]))
    ringed = scatter([("", points)], labels, marked=np.array([False, True]))
    rows, columns = np.nonzero((plain != ringed).any(axis=-1))
    assert columns.min() > 200
    assert (ringed[rows, columns].min(axis=-1) > 160).sum() > 20


def test_scatter_of_many_classes_colours_the_twenty_most_frequent():
    """And says how many are grey."""
    labels = np.concatenate([np.arange(30), np.arange(10, 30), [-1]])
    assert list(class_colors(labels)) == list(range(10, 30))
    assert len(set(class_colors(labels).values())) == 20
    points = cloud(len(labels))
    picture, fewer = scatter([("", points)], labels), scatter([("", points[10:])], labels[10:])
    assert picture.shape[0] == fewer.shape[0] + LINE
    assert len(where(picture, (104, 104, 110))[0]) > 20


def test_scatter_points_without_a_label_are_grey():
    """They are no class and have no name."""
    assert class_colors(np.array([-1, -100])) == {}
    picture = scatter_frame(np.zeros((1, 2)), np.array([-1]))
    assert len(where(picture, (104, 104, 110))[0]) > 0


def test_scatter_is_the_same_each_time_and_leaves_the_generators_alone():
    """The mixed order is a fixed one."""
    points, labels = cloud(500), np.arange(500) % 10
    np.random.seed(3)
    first = scatter([("a", points)], labels)
    drawn = np.random.random()
    np.random.seed(3)
    assert drawn == np.random.random()
    assert np.array_equal(first, scatter([("a", points)], labels))


def test_scatter_no_class_hides_the_others():
    """Two classes in the same places each have about half of the pixels."""
    points = np.repeat(cloud(300), 2, axis=0)
    labels = np.tile([0, 1], 300)
    picture = scatter_frame(points, labels, side=200)
    first, second = (where(picture, color)[0].size for color in class_colors(labels).values())
    assert 0.6 < first / second < 1.6


def test_frame_has_the_same_size_each_time():
    """Of one point and of many."""
    assert {scatter_frame(cloud(n), np.zeros(n, int)).shape for n in (0, 1, 200)} == {(78, 78, 3)}


def test_scatter_refuses_what_does_not_fit_together():
    """Panels, labels and marks of one length."""
    labels = np.zeros(3, int)
    with pytest.raises(ValueError, match="panels"):
        scatter([], labels)
    with pytest.raises(ValueError, match="coordinates"):
        scatter([("", cloud(4))], labels)
    with pytest.raises(ValueError, match="coordinates"):
        scatter_frame(np.zeros((3, 3)), labels)
    with pytest.raises(ValueError, match="marked"):
        scatter([("", cloud(3))], labels, marked=np.zeros(2, bool))
