import pytest
from chats import make_processor


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def byte_processor():
    return make_processor("bytes")
