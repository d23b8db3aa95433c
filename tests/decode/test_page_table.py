"""Page accounting: the Python class, and the native one where it was built, against a model without pages."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import rrt.decode.page_table
from rrt.decode.page_table import OutOfPages, PageTable, make_page_table
from rrt.native import load_plan, warn_without_plan

IMPLEMENTATIONS = {"python": PageTable}
if rrt.decode.page_table._native is not None:
    IMPLEMENTATIONS["native"] = rrt.decode.page_table._native.PageTable


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return IMPLEMENTATIONS[request.param]


class Machine(RuleBasedStateMachine):
    """Every implementation beside a simple model, in which a sequence is the list of tokens at its positions.

    Slots hold a token per position, as a cache would. So sharing, copies and reuse of pages are checked by the
    tokens that sequences read, and page counts by the number of sharers.
    """

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 4))
    def start(self, num_pages, page_size):
        self.page_size = page_size
        self.tables = [make(num_pages, page_size) for make in IMPLEMENTATIONS.values()]
        self.memory = [[None] * (num_pages * page_size) for _ in self.tables]
        self.handles = []  # per sequence one handle in each table
        self.contents = []
        self.freed = []
        self.next_token = 0

    def sequences(self, data, least=1, most=1):
        indices = st.integers(0, len(self.handles) - 1)
        return data.draw(st.lists(indices, min_size=least, max_size=most))

    def in_every_table(self, call):
        """The result of call(table, number of the table), which all tables share."""
        results = []
        for i, table in enumerate(self.tables):
            before = self.snapshot(i)
            try:
                results.append(call(table, i))
            except OutOfPages as error:
                assert self.snapshot(i) == before
                results.append(str(error))
        assert all(result == results[0] for result in results)
        return results[0]

    def snapshot(self, i):
        table = self.tables[i]
        sequences = [(table.length(handles[i]), list(table.pages(handles[i]))) for handles in self.handles]
        return sequences, table.num_free_pages, [table.refcount(page) for page in range(table.num_pages)]

    @rule()
    def create(self):
        self.handles.append([table.create() for table in self.tables])
        self.contents.append([])

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def append(self, data):
        chosen = self.sequences(data, most=4)
        counts = data.draw(st.lists(st.integers(0, 6), min_size=len(chosen), max_size=len(chosen)))
        free = self.tables[0].num_free_pages
        if len(chosen) == 1:
            [which], [count] = chosen, counts
            predicted = self.in_every_table(lambda table, i: table.pages_needed(self.handles[which][i], count))
            copies = self.in_every_table(lambda table, i: list(table.append(self.handles[which][i], count)))
            assert (predicted > free) == isinstance(copies, str)
        else:
            copies = self.in_every_table(
                lambda table, i: list(table.append_many([self.handles[which][i] for which in chosen], counts))
            )
        if isinstance(copies, str):
            return
        if len(chosen) == 1:
            assert free - self.tables[0].num_free_pages == predicted
        for memory in self.memory:
            for source, target in copies:
                size = self.page_size
                memory[target * size : (target + 1) * size] = memory[source * size : (source + 1) * size]
        for which, count in zip(chosen, counts, strict=True):
            for _ in range(count):
                self.write(which)

    def write(self, which):
        """A fresh token at the next position of the sequence."""
        position = len(self.contents[which])
        for table, memory, handle in zip(self.tables, self.memory, self.handles[which], strict=True):
            [slot] = table.slots([handle], [position])
            assert table.refcount(slot // self.page_size) == 1
            memory[slot] = self.next_token
        self.contents[which].append(self.next_token)
        self.next_token += 1

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def fork(self, data):
        [which] = self.sequences(data)
        self.handles.append(
            [table.fork(handle) for table, handle in zip(self.tables, self.handles[which], strict=True)]
        )
        self.contents.append(list(self.contents[which]))

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def alias(self, data):
        which, of = self.sequences(data, 2, 2)
        for i, table in enumerate(self.tables):
            table.alias(self.handles[which][i], self.handles[of][i])
        self.contents[which] = list(self.contents[of])

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def truncate(self, data):
        [which] = self.sequences(data)
        length = data.draw(st.integers(0, len(self.contents[which])))
        for table, handle in zip(self.tables, self.handles[which], strict=True):
            table.truncate(handle, length)
        del self.contents[which][length:]

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def free(self, data):
        [which] = self.sequences(data)
        for table, handle in zip(self.tables, self.handles[which], strict=True):
            table.free(handle)
        self.freed.append(self.handles.pop(which))
        del self.contents[which]

    @invariant()
    def freed_handles_are_refused(self):
        for handles in getattr(self, "freed", [])[-3:]:
            for table, handle in zip(self.tables, handles, strict=True):
                with pytest.raises(ValueError, match=f"handle: found {handle}; expected a sequence"):
                    table.free(handle)

    @invariant()
    def accounts_are_exact(self):
        for i, table in enumerate(getattr(self, "tables", [])):
            table.check()
            held = [list(table.pages(handles[i])) for handles in self.handles]
            counts = [sum(page in pages for pages in held) for page in range(table.num_pages)]
            assert counts == [table.refcount(page) for page in range(table.num_pages)]
            assert table.num_used_pages == sum(count > 0 for count in counts)
            assert table.num_free_pages + table.num_used_pages == table.num_pages
            assert table.num_sequences == len(self.handles)

    @invariant()
    def sequences_read_what_was_written(self):
        for i, table in enumerate(getattr(self, "tables", [])):
            handles = [handles[i] for handles in self.handles]
            assert [table.length(handle) for handle in handles] == [len(content) for content in self.contents]
            for handle, content in zip(handles, self.contents, strict=True):
                pages, size = table.pages(handle), self.page_size
                assert [self.memory[i][pages[p // size] * size + p % size] for p in range(len(content))] == content
                own = [p for p in range(len(content)) if table.refcount(pages[p // size]) == 1]
                slots = table.slots([handle] * len(own), own)
                assert slots.dtype == np.int64
                assert slots.tolist() == [pages[p // size] * size + p % size for p in own]
                for p in {*range(len(content))} - {*own}:
                    with pytest.raises(ValueError, match=f"found {p}; expected one in a page that no other sequence"):
                        table.slots([handle], [p])
            tables = table.block_tables(handles)
            assert tables.dtype == np.int32
            pages = [list(table.pages(handle)) for handle in handles]
            width = max(map(len, pages), default=0)
            assert tables.shape == (len(handles), width)
            assert tables.tolist() == [row + [0] * (width - len(row)) for row in pages]

    @invariant()
    def implementations_agree_page_by_page(self):
        if hasattr(self, "tables"):
            assert all(self.snapshot(i) == self.snapshot(0) for i in range(len(self.tables)))


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestMachine = Machine.TestCase


def test_a_shared_page_is_copied_by_whoever_appends_first(implementation):
    table = implementation(8, 4)
    first = table.create()
    table.append(first, 6)
    second = table.fork(first)
    full, partly = table.pages(first)
    [(source, target)] = table.append(second, 1)
    assert source == partly
    assert table.pages(second) == [full, target]
    assert table.append(first, 1) == []
    assert table.pages(first) == [full, partly]
    assert (table.refcount(full), table.refcount(partly), table.num_used_pages) == (2, 1, 3)


def test_full_pages_are_shared_without_a_copy(implementation):
    table = implementation(8, 4)
    first = table.create()
    table.append(first, 8)
    second = table.fork(first)
    assert table.append(second, 1) == []
    assert table.pages(second)[:2] == table.pages(first)


def test_appends_of_many_are_all_or_nothing(implementation):
    table = implementation(5, 2)
    first = table.create()
    table.append(first, 3)
    second = table.fork(first)
    pages = table.pages(first)
    with pytest.raises(OutOfPages, match="found 0 free pages of 5; expected 1 or more"):
        table.append_many([first, second, first, second], [1, 3, 2, 1])
    assert table.pages(first) == table.pages(second) == pages
    assert (table.length(first), table.length(second), table.num_free_pages) == (3, 3, 3)
    table.check()
    assert table.append_many([first, second], [1, 3]) == [(pages[1], 2)]


def test_a_bad_row_leaves_the_rows_before_it_unchanged(implementation):
    table = implementation(5, 2)
    handle = table.create()
    with pytest.raises(ValueError, match="count: found -1; expected 0 to"):
        table.append_many([handle, handle], [3, -1])
    assert (table.length(handle), table.num_free_pages) == (0, 5)


def test_alias_gives_up_its_own_pages(implementation):
    table = implementation(6, 2)
    deep, exited = table.create(), table.create()
    table.append(exited, 3)
    table.append(deep, 5)
    table.alias(deep, exited)
    assert (table.length(deep), table.pages(deep), table.num_used_pages) == (3, table.pages(exited), 2)
    table.alias(deep, deep)
    table.free(exited)
    assert (table.length(deep), table.num_used_pages) == (3, 2)


def test_bad_arguments_are_named(implementation):
    for sizes, message in (((0, 4), "num_pages: found 0; expected 1"), ((4, -1), "page_size: found -1; expected 1")):
        with pytest.raises(ValueError, match=message):
            implementation(*sizes)
    table = implementation(4, 2)
    handle = table.create()
    table.append(handle, 3)
    for call, message in (
        (lambda: table.append(handle, -1), "count: found -1; expected 0 to 2147483644"),
        (lambda: table.append(handle, 2**31 - 1), "count: found 2147483647; expected 0 to 2147483644"),
        (lambda: table.pages_needed(handle, -1), "count: found -1; expected 0 to 2147483644"),
        (lambda: table.truncate(handle, 4), "length: found 4; expected 0 to 3"),
        (lambda: table.truncate(handle, -1), "length: found -1; expected 0 to 3"),
        (lambda: table.refcount(4), r"page: found 4; expected a page in \[0, 4\)"),
        (lambda: table.slots([handle, handle], [0, 3]), r"positions\[1\]: found 3; expected a position in \[0, 3\)"),
        (lambda: table.slots([handle], [-1]), r"positions\[0\]: found -1; expected a position in \[0, 3\)"),
        (lambda: table.slots([handle], [0, 1]), "positions: found 2 entries; expected 1 as in handles"),
        (lambda: table.append_many([handle], []), "counts: found 0 entries; expected 1 as in handles"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for unknown in (0, -1, handle + 1, handle + 2**32, -(2**63)):
        for call in (
            lambda h: table.length(h),
            lambda h: table.pages(h),
            lambda h: table.append(h, 1),
            lambda h: table.fork(h),
            lambda h: table.alias(handle, h),
            lambda h: table.alias(h, handle),
            lambda h: table.truncate(h, 0),
            lambda h: table.free(h),
            lambda h: table.slots([h], [0]),
            lambda h: table.block_tables([handle, h]),
        ):
            with pytest.raises(ValueError, match=f"handle: found {unknown}; expected a sequence that was created"):
                call(unknown)
    assert (table.length(handle), table.num_sequences) == (3, 1)
    table.check()


def test_an_empty_pass_has_empty_arrays(implementation):
    table = implementation(4, 2)
    assert table.slots([], []).shape == (0,)
    assert table.block_tables([]).shape == (0, 0)
    assert table.block_tables([table.create()]).shape == (1, 0)
    assert table.append_many([], []) == []


def test_check_finds_a_broken_account():
    table = PageTable(4, 2)
    table.append(table.create(), 3)
    table._refcounts[0] += 1
    with pytest.raises(RuntimeError, match="reference count"):
        table.check()


@pytest.mark.fallback
@pytest.mark.skipif("native" in IMPLEMENTATIONS, reason="rrt._plan is loaded")
def test_without_native_code_the_python_class_runs_and_one_warning_says_so():
    warn_without_plan.cache_clear()
    with pytest.warns(UserWarning, match="host planning runs in Python: ") as warned:
        tables = [make_page_table(1, 1) for _ in range(2)]
    assert len(warned) == 1 and load_plan().reason in str(warned[0].message)
    assert all(type(table) is PageTable for table in tables)
    with pytest.raises(OutOfPages):
        tables[0].append(tables[0].create(), 2)


@pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason="rrt._plan was not built")
def test_the_native_class_runs_where_it_was_built():
    assert type(make_page_table(2, 2)) is IMPLEMENTATIONS["native"]
