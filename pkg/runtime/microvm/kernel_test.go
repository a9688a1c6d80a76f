package microvm

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// fakeVmlinux is the smallest ELF file with a PVH note, followed by body.
func fakeVmlinux(body []byte) []byte {
	var b bytes.Buffer
	b.Write([]byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	note := []byte("\x04\x00\x00\x00\x04\x00\x00\x00\x12\x00\x00\x00Xen\x00\x00\x00\x00\x01")
	write := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) }
	write([]uint16{2, 62})
	write(uint32(1))
	write([]uint64{0x1000000, 64, 0})
	write(uint32(0))
	write([]uint16{64, 56, 1, 0, 0, 0})
	write([]uint32{4, 4})
	write([]uint64{120, 0, 0, uint64(len(note)), uint64(len(note)), 4})
	b.Write(note)
	b.Write(body)
	return b.Bytes()
}

// fakeBzImage wraps a packed payload in a boot header.
func fakeBzImage(payload []byte, release string) []byte {
	const setup = 3
	image := make([]byte, (setup+1)*sectorSize)
	image[offSetupSects] = setup
	copy(image[offHeaderMagic:], "HdrS")
	binary.LittleEndian.PutUint16(image[offVersion:], 0x20f)
	binary.LittleEndian.PutUint16(image[offKernelVersion:], 0x100)
	copy(image[0x300:], release+" (someone@somewhere) #1 SMP\x00")
	const gap = 32
	binary.LittleEndian.PutUint32(image[offPayload:], gap)
	binary.LittleEndian.PutUint32(image[offPayloadLength:], uint32(len(payload)))
	image = append(image, make([]byte, gap)...)
	image = append(image, payload...)
	return append(image, "what follows the payload"...)
}

func withSize(packed []byte, size int) []byte {
	return binary.LittleEndian.AppendUint32(packed, uint32(size))
}

// machineCode is bytes with many call and jump opcodes, near each other too, some with and some without plausible targets.
func machineCode(n int) []byte {
	rnd := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = []byte{0xe8, 0xe9, 0x00, 0xff, 0x01, byte(rnd.Uint32())}[rnd.IntN(6)]
	}
	return b
}

func pack(t *testing.T, name string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	switch name {
	case "gzip":
		w := gzip.NewWriter(&out)
		_, err := w.Write(b)
		check(err)
		check(w.Close())
		return out.Bytes()
	case "xz":
		w, err := xz.NewWriter(&out)
		check(err)
		_, err = w.Write(b)
		check(err)
		check(w.Close())
	case "xz-x86":
		cmd := exec.Command("xz", "--check=crc32", "--x86", "--lzma2=dict=32MiB")
		cmd.Stdin = bytes.NewReader(b)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatalf("cannot run xz (apt-get install xz-utils): %v", err)
		}
		out.Write(packed)
	case "zstd":
		w, err := zstd.NewWriter(&out)
		check(err)
		_, err = w.Write(b)
		check(err)
		check(w.Close())
	case "lz4":
		w := lz4.NewWriter(&out)
		check(w.Apply(lz4.LegacyOption(true)))
		_, err := w.Write(b)
		check(err)
		check(w.Close())
	}
	return withSize(out.Bytes(), len(b))
}

func TestParseKernelUnpacksEveryCompression(t *testing.T) {
	for name, size := range map[string]int{
		"gzip": 1 << 20, "xz": 1 << 18, "xz-x86": 1 << 20, "zstd": 1 << 20,
		"lz4": 9 << 20, // more than one of its blocks
	} {
		t.Run(name, func(t *testing.T) {
			want := fakeVmlinux(machineCode(size))
			got, err := parseKernel(fakeBzImage(pack(t, name, want), "6.1.0-1-cloud-amd64"))
			if err != nil {
				t.Fatal(err)
			}
			if got.release != "6.1.0-1-cloud-amd64" {
				t.Errorf("release %q", got.release)
			}
			if !bytes.Equal(got.vmlinux, want) {
				t.Errorf("unpacked %d bytes differ from the %d packed", len(got.vmlinux), len(want))
			}
		})
	}
}

func TestParseKernelTakesAnELFFile(t *testing.T) {
	want := fakeVmlinux([]byte("....Linux version 6.9.1-own (x@y) #1\n"))
	got, err := parseKernel(want)
	if err != nil || got.release != "6.9.1-own" || !bytes.Equal(got.vmlinux, want) {
		t.Errorf("release %q, error %v", got.release, err)
	}
}

func TestParseKernelRefuses(t *testing.T) {
	good := fakeBzImage(pack(t, "gzip", fakeVmlinux(nil)), "6.1.0")
	change := func(fn func(b []byte)) []byte {
		b := bytes.Clone(good)
		fn(b)
		return b
	}
	for name, c := range map[string]struct {
		image []byte
		want  string
	}{
		"nothing":         {nil, "no boot header"},
		"text":            {bytes.Repeat([]byte("x"), 4096), "no boot header"},
		"old protocol":    {change(func(b []byte) { b[offVersion] = 7 }), "2.07 is too old"},
		"cut off":         {good[:len(good)/2], "truncated"},
		"huge payload":    {change(func(b []byte) { copy(b[offPayloadLength:], "\xff\xff\xff\xff") }), "truncated"},
		"far payload":     {change(func(b []byte) { copy(b[offPayload:], "\xff\xff\xff\xff") }), "truncated"},
		"tiny payload":    {change(func(b []byte) { copy(b[offPayloadLength:], "\x03\x00\x00\x00") }), "truncated"},
		"no version":      {change(func(b []byte) { copy(b[offKernelVersion:], "\x00\x00") }), "version"},
		"far version":     {change(func(b []byte) { copy(b[offKernelVersion:], "\xff\xff") }), "version"},
		"path in release": {fakeBzImage(pack(t, "gzip", fakeVmlinux(nil)), "../../etc"), "is not one"},
		"dots in release": {fakeBzImage(pack(t, "gzip", fakeVmlinux(nil)), ".."), "is not one"},
		"long release":    {fakeBzImage(pack(t, "gzip", fakeVmlinux(nil)), strings.Repeat("6", 70)), "release"},
		"bzip2":           {fakeBzImage([]byte("BZh91AY&SY......"), "6.1.0"), "unknown compression"},
		"broken gzip":     {fakeBzImage([]byte("\x1f\x8b\x08\x00............"), "6.1.0"), "gzip"},
		"no ELF inside":   {fakeBzImage(pack(t, "gzip", []byte("hello")), "6.1.0"), "cannot read the unpacked kernel"},
		"no PVH":          {fakeBzImage(pack(t, "gzip", bytes.Replace(fakeVmlinux(nil), []byte("Xen"), []byte("Nex"), 1)), "6.1.0"), "CONFIG_PVH"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseKernel(c.image)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestDecompressStopsAtItsLimit(t *testing.T) {
	bomb := make([]byte, 1<<20)
	for _, name := range []string{"gzip", "xz", "zstd", "lz4"} {
		if _, err := decompress(pack(t, name, bomb), 1<<20-1); err == nil || !strings.Contains(err.Error(), "too large") {
			t.Errorf("%s: error %v, want one that says too large", name, err)
		}
		if _, err := decompress(pack(t, name, bomb), 1<<20); err != nil {
			t.Errorf("%s at exactly the limit: %v", name, err)
		}
	}
}

func TestXZX86NoticesDamage(t *testing.T) {
	packed := pack(t, "xz-x86", machineCode(1<<16))
	packed[len(packed)/2] ^= 1
	if _, err := decompress(packed, 1<<20); err == nil {
		t.Error("damaged data were unpacked")
	}
}

func FuzzParseKernel(f *testing.F) {
	f.Add(fakeVmlinux(nil))
	f.Add(fakeBzImage([]byte("\x1f\x8b\x08\x00............"), "6.1.0"))
	f.Add(fakeBzImage([]byte("\xfd7zXZ\x00\x00\x01iB\xde6\x02\x01\x04\x00\x21\x01\x16\x00"), "6.1.0"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = parseKernel(b) // must neither panic nor run out of memory
	})
}

// realKernel is the guest kernel that make unpacks into .cache, or the host's own.
func realKernel(t testing.TB) string {
	t.Helper()
	for _, pattern := range []string{"../../../.cache/kernel/boot/vmlinuz-*-cloud-amd64", "/boot/vmlinuz-*-cloud-amd64"} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			path, err := filepath.Abs(found[len(found)-1])
			if err != nil {
				t.Fatal(err)
			}
			return path
		}
	}
	t.Skip("no guest kernel: unpack the package linux-image-cloud-amd64 into .cache/kernel (dpkg-deb -x), or install it")
	return ""
}

func TestParseKernelOfADistribution(t *testing.T) {
	path := realKernel(t)
	image, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseKernel(image)
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.TrimPrefix(filepath.Base(path), "vmlinuz-"); got.release != want {
		t.Errorf("release %q, want %q", got.release, want)
	}
}
