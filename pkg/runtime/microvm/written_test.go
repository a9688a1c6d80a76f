package microvm

import (
	"fmt"
	"math"
	"testing"
)

// What a guest wrote is the sum over its disks, whatever QEMU says it is.
func TestWrittenIsSummedAndBounded(t *testing.T) {
	const disks = `{"return":[{"stats":{"wr_bytes":0,"wr_operations":0}},{"qdev":"disk","stats":{"wr_bytes":%d,"wr_operations":%d}},{"stats":{"wr_bytes":4096,"wr_operations":1}}]}` + "\n"
	for _, c := range []struct{ says, bytes, operations uint64 }{
		{25165824, 25169920, 25165825},
		{math.MaxInt64 - 4096, math.MaxInt64, math.MaxInt64 - 4095},
		{math.MaxUint64, math.MaxInt64, math.MaxInt64},
	} {
		q, err := newQMP(t.Context(), fakeQEMU(t, qmpGreeting, qmpEmpty, fmt.Sprintf(disks, c.says, c.says)))
		if err != nil {
			t.Fatal(err)
		}
		if bytes, operations, err := q.written(t.Context()); err != nil || bytes != c.bytes || operations != c.operations {
			t.Errorf("of %d: %d bytes in %d operations, %v; want %d, %d", c.says, bytes, operations, err, c.bytes, c.operations)
		}
	}
	q, err := newQMP(t.Context(), fakeQEMU(t, qmpGreeting, qmpEmpty, `{"return":[{"stats":{"wr_bytes":-1}}]}`+"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := q.written(t.Context()); err == nil {
		t.Error("less than nothing was believed")
	}
}
