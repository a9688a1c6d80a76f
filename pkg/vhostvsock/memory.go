package vhostvsock

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// region is one piece of guest memory, mapped here.
type region struct {
	// Where the guest and where QEMU have it: descriptors hold the first kind of address, SET_VRING_ADDR the second.
	guest, user uint64
	data        []byte
}

// guestMemory is what SET_MEM_TABLE gave us.
type guestMemory struct {
	regions []region
}

// regionDesc is an entry of SET_MEM_TABLE.
type regionDesc struct {
	guest, size, user, offset uint64
}

// mapMemory maps a memory table. The descriptors stay the caller's.
func mapMemory(descs []regionDesc, fds []int) (_ *guestMemory, err error) {
	if len(descs) == 0 || len(descs) > maxRegions || len(descs) != len(fds) {
		return nil, fmt.Errorf("memory table has %d regions and %d descriptors, want 1 to %d of both",
			len(descs), len(fds), maxRegions)
	}
	m := &guestMemory{}
	defer func() {
		if err != nil {
			m.unmap()
		}
	}()
	for i, d := range descs {
		if err := d.check(fds[i]); err != nil {
			return nil, fmt.Errorf("memory region %d: %w", i, err)
		}
		data, err := unix.Mmap(fds[i], int64(d.offset), int(d.size), unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_SHARED|unix.MAP_NORESERVE)
		if err != nil {
			return nil, fmt.Errorf("cannot map memory region %d: %w", i, err)
		}
		m.regions = append(m.regions, region{guest: d.guest, user: d.user, data: data})
	}
	return m, nil
}

func (d regionDesc) check(fd int) error {
	if d.size == 0 || d.size > math.MaxInt64 || d.guest > math.MaxUint64-d.size || d.user > math.MaxUint64-d.size ||
		d.offset > math.MaxInt64-d.size {
		return fmt.Errorf("its addresses overflow (guest %#x, size %#x, user %#x, offset %#x)", d.guest, d.size, d.user,
			d.offset)
	}
	if d.offset%uint64(unix.Getpagesize()) != 0 {
		return fmt.Errorf("its offset %#x is not a whole page", d.offset)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("cannot stat its descriptor: %w", err)
	}
	if st.Size < 0 || uint64(st.Size) < d.offset+d.size {
		return fmt.Errorf("it ends at %#x, past the end of its file at %#x", d.offset+d.size, st.Size)
	}
	return nil
}

func (m *guestMemory) unmap() {
	for _, r := range m.regions {
		_ = unix.Munmap(r.data)
	}
	m.regions = nil
}

// appendSlices appends the n bytes at guest address addr to dst: one slice, or more where they lie across adjoining
// regions.
func (m *guestMemory) appendSlices(dst [][]byte, addr uint64, n uint32) ([][]byte, error) {
	if n == 0 {
		return dst, nil
	}
	if addr > math.MaxUint64-uint64(n) {
		return dst, fmt.Errorf("guest address %#x+%#x overflows", addr, n)
	}
	left := uint64(n)
	for left > 0 {
		s := m.find(addr, func(r *region) uint64 { return r.guest })
		if len(s) == 0 {
			return dst, fmt.Errorf("guest address %#x is outside its memory", addr)
		}
		take := min(left, uint64(len(s)))
		dst = append(dst, s[:take:take])
		addr += take
		left -= take
	}
	return dst, nil
}

// at returns n bytes at guest address addr, which must lie in one region.
func (m *guestMemory) at(addr uint64, n int) ([]byte, error) {
	return exactly(m.find(addr, func(r *region) uint64 { return r.guest }), addr, n)
}

// atUser returns n bytes at an address of QEMU's, which must lie in one region.
func (m *guestMemory) atUser(addr uint64, n int) ([]byte, error) {
	return exactly(m.find(addr, func(r *region) uint64 { return r.user }), addr, n)
}

func exactly(s []byte, addr uint64, n int) ([]byte, error) {
	if len(s) < n {
		return nil, fmt.Errorf("address %#x+%#x is outside the guest's memory", addr, n)
	}
	return s[:n:n], nil
}

// find returns what follows addr in the region that contains it.
func (m *guestMemory) find(addr uint64, base func(*region) uint64) []byte {
	for i := range m.regions {
		r := &m.regions[i]
		if b := base(r); addr >= b && addr-b < uint64(len(r.data)) {
			return r.data[addr-b:]
		}
	}
	return nil
}
