"Cutting a tensor into chunks: each value once, none too large, the classes whole, what lies together kept together."
import pytest, torch

from fastai_smooth.kernels.chunks import chunks, part

LAYOUTS = {'rows': ((700, 1000), 1), 'columns': ((1000, 700), 0), 'turned': ((700, 1000), 1), 'image': ((3, 21, 130, 90), 1), 'channels_last': ((3, 21, 130, 90), 1),
           'one image': ((1, 7, 300, 200), 1), 'volume': ((2, 5, 9, 80, 60), 1), 'any axis': ((4, 300, 500), None), 'one row': ((1, 400_000), 1), 'one class': ((400_000, 1), 1)}

def tensor(layout):
    shape, axis = LAYOUTS[layout]
    x = torch.zeros(shape)
    if layout == 'turned': x = x.T.contiguous().T
    if layout == 'channels_last': x = x.to(memory_format=torch.channels_last)
    return x, axis

@pytest.mark.parametrize('layout', LAYOUTS)
def test_chunks(layout):
    "each value is in one chunk; a chunk has all classes, and at most a megabyte unless it is one row"
    x, axis = tensor(layout)
    for chunk in chunks(x, axis, megabytes=1):
        piece = x[chunk]
        piece += 1
        assert axis is None or piece.shape[axis] == x.shape[axis]
        assert piece.nbytes <= 2**20 or piece.numel() == x.shape[axis]
    assert (x == 1).all()

@pytest.mark.parametrize('layout', ['rows', 'image', 'channels_last', 'turned'])
def test_chunks_are_large_and_few(layout):
    "more than half of what they may be, but for the last one of each image"
    x, axis = tensor(layout)
    sizes = [x[chunk].nbytes for chunk in chunks(x, axis, megabytes=1)]
    assert len(sizes) <= 2 * x.nbytes / 2**20 + x.shape[0] * (x.dim() > 2) and max(sizes) > 2**19

@pytest.mark.parametrize('layout', ['rows', 'channels_last', 'columns', 'any axis'])
def test_a_chunk_lies_together(layout):
    "the axes of the largest strides are cut, so that nothing lies between the values of a chunk. Where classes are those, it can't"
    x, axis = tensor(layout)
    whole = layout != 'columns'
    for chunk in chunks(x, axis, megabytes=1):
        piece = x[chunk]
        extent = 1 + sum((n - 1) * s for n, s in zip(piece.shape, piece.stride()))
        assert (extent == piece.numel()) == whole

def test_what_is_small_is_one_chunk():
    "to the last value; and so is what is elsewhere, where launches cost more"
    assert chunks(torch.zeros(2**18), None, megabytes=1) == [...] and len(chunks(torch.zeros(2**18 + 1), None, megabytes=1)) == 2
    assert chunks(torch.zeros(2**19), None, megabytes=2) == [...] and len(chunks(torch.zeros(2**19), None, megabytes=1)) == 2
    assert chunks(torch.zeros(0, 3), 1, 1) == [...] and chunks(torch.zeros(()), None, 1) == [...]
    assert chunks(torch.zeros(1000, 10_000, device='meta'), 1, 1) == [...]

def test_part():
    "of a tensor its chunk; of what is the same for all chunks, itself"
    v, chunk = torch.arange(6).view(3, 2), (slice(1, 3), slice(None))
    assert part(v, chunk).tolist() == [[2, 3], [4, 5]] and part(v, ...) is v
    for same in (None, 2., torch.tensor(3.)): assert part(same, chunk) is same
