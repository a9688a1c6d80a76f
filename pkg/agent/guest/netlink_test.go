package guest

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestBroadcast(t *testing.T) {
	for prefix, want := range map[string]string{
		"10.0.0.2/24": "10.0.0.255", "10.1.2.3/8": "10.255.255.255", "10.0.0.2/30": "10.0.0.3", "10.0.0.2/0": "255.255.255.255",
		"10.0.0.2/31": "", "10.0.0.2/32": "", "fd00::2/64": "",
	} {
		got, ok := broadcast(netip.MustParsePrefix(prefix))
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %v %t, want %q", prefix, got, ok, want)
		}
	}
}

func TestAttributesAreAligned(t *testing.T) {
	var a attributes
	a.add(3, []byte("eth0\x00"))
	a.addUint32(4, 1400)
	if len(a) != 12+8 || !slices.Equal(a[9:12], []byte{0, 0, 0}) || binary.NativeEndian.Uint16(a) != 9 {
		t.Errorf("% x", a)
	}
}

// The kernel refuses what names no interface, and says so.
func TestNetlinkHearsRefusals(t *testing.T) {
	k, err := openNetlink()
	if err != nil {
		t.Fatal(err)
	}
	defer k.close()
	for range 2 {
		if err := k.request(unix.RTM_NEWLINK, 0, linkMessage(1<<30, 0, 0), nil); !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EPERM) {
			t.Errorf("changing an interface that is not there: %v", err)
		}
	}
}

func FuzzAcknowledged(f *testing.F) {
	f.Add([]byte{36, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, uint32(1))
	f.Fuzz(func(t *testing.T, b []byte, sequence uint32) {
		if err := acknowledged(b, sequence); err == nil && len(b) < unix.NLMSG_HDRLEN+4 {
			t.Error("took half an answer")
		}
	})
}
