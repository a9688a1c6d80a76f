package microvm

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// A distribution's kernel is a bzImage: a small loader with the kernel proper, an ELF file, compressed inside it. QEMU
// enters the ELF file directly by its PVH entry, which saves the guest decompressing itself: about 400 ms under TCG.
// Format: Documentation/arch/x86/boot.rst of the kernel, "THE REAL-MODE KERNEL HEADER".

const (
	// maxKernelImage bounds a vmlinuz. The largest distributions ship about 20 MiB.
	maxKernelImage = 128 << 20
	// maxKernelELF bounds what a vmlinuz may unpack to. Distributions ship 40 to 80 MiB.
	maxKernelELF = 512 << 20
	// maxKernelRelease bounds the release string: the kernel's own is at most 64 bytes.
	maxKernelRelease = 64
)

// Offsets in the real-mode header, and what the values must be.
const (
	offSetupSects    = 0x1f1
	offHeaderMagic   = 0x202 // "HdrS"
	offVersion       = 0x206
	offKernelVersion = 0x20e // offset of the version string, less 0x200
	offPayload       = 0x248 // u32, from the end of the setup sectors; since protocol 2.08
	offPayloadLength = 0x24c // u32
	headerEnd        = 0x250
	minProtocol      = 0x0208
	sectorSize       = 512
)

// kernelImage is a vmlinuz taken apart.
type kernelImage struct {
	// As uname -r prints it: modules lie in lib/modules/<release>.
	release string
	// The ELF file.
	vmlinux []byte
}

// parseKernel takes a vmlinuz (or an ELF vmlinux) apart. It trusts nothing in the file: an operator may bring any.
func parseKernel(image []byte) (kernelImage, error) {
	if bytes.HasPrefix(image, []byte(elf.ELFMAG)) {
		release, err := releaseOfELF(image)
		if err != nil {
			return kernelImage{}, err
		}
		return kernelImage{release: release, vmlinux: image}, checkPVH(image)
	}
	payload, release, err := bzImagePayload(image)
	if err != nil {
		return kernelImage{}, err
	}
	vmlinux, err := decompress(payload, maxKernelELF)
	if err != nil {
		return kernelImage{}, fmt.Errorf("cannot unpack the kernel: %w", err)
	}
	return kernelImage{release: release, vmlinux: vmlinux}, checkPVH(vmlinux)
}

// bzImagePayload finds the compressed kernel and the release in a bzImage.
func bzImagePayload(image []byte) (payload []byte, release string, err error) {
	if len(image) < headerEnd || string(image[offHeaderMagic:offHeaderMagic+4]) != "HdrS" {
		return nil, "", errors.New("not an x86 Linux kernel: no boot header")
	}
	if v := binary.LittleEndian.Uint16(image[offVersion:]); v < minProtocol {
		return nil, "", fmt.Errorf("boot protocol %d.%02d is too old, 2.08 is needed", v>>8, v&0xff)
	}
	setup := int(image[offSetupSects])
	if setup == 0 {
		setup = 4 // the header's rule for kernels of the last century
	}
	start := uint64((setup+1)*sectorSize) + uint64(binary.LittleEndian.Uint32(image[offPayload:]))
	length := uint64(binary.LittleEndian.Uint32(image[offPayloadLength:]))
	if length < 8 || start+length > uint64(len(image)) {
		return nil, "", fmt.Errorf("truncated kernel: its payload of %d bytes at %d ends after the file's %d bytes", length, start, len(image))
	}
	version := int(binary.LittleEndian.Uint16(image[offKernelVersion:]))
	if version == 0 || version+0x200 >= len(image) {
		return nil, "", errors.New("the kernel does not say its version")
	}
	release, err = releaseOf(image[version+0x200:])
	return image[start : start+length], release, err
}

// releaseOf is the first word of a version string: "6.1.0-56-cloud-amd64 (maintainer) #1 SMP ...".
func releaseOf(b []byte) (string, error) {
	b = b[:min(len(b), maxKernelRelease+1)]
	end := bytes.IndexAny(b, " \x00\n")
	if end <= 0 {
		return "", errors.New("the kernel does not say its release")
	}
	release := string(b[:end])
	// It becomes part of a path.
	if release == "." || release == ".." || strings.ContainsFunc(release, func(r rune) bool {
		return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || strings.ContainsRune("._+-~", r))
	}) {
		return "", fmt.Errorf("the kernel's release %q is not one", release)
	}
	return release, nil
}

func releaseOfELF(image []byte) (string, error) {
	marker := []byte("Linux version ")
	i := bytes.Index(image, marker)
	if i < 0 {
		return "", errors.New("not a Linux kernel: the ELF file has no version string")
	}
	return releaseOf(image[i+len(marker):])
}

// The ELF note that gives a kernel's PVH entry: XEN_ELFNOTE_PHYS32_ENTRY of the kernel's xen/interface/elfnote.h.
const (
	pvhNoteName = "Xen\x00"
	pvhNoteType = 18
)

// checkPVH says whether QEMU can enter vmlinux directly: without the note it would boot nothing and say nothing.
func checkPVH(vmlinux []byte) error {
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		return fmt.Errorf("cannot read the unpacked kernel: %w", err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("the kernel is for %v, x86-64 is needed", f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Off > uint64(len(vmlinux)) || p.Filesz > uint64(len(vmlinux))-p.Off {
			continue
		}
		if hasPVHNote(vmlinux[p.Off : p.Off+p.Filesz]) {
			return nil
		}
	}
	return errors.New("the kernel has no PVH entry: one built with CONFIG_PVH=y is needed, as Debian's linux-image-cloud-amd64 is")
}

// hasPVHNote walks a note segment: name size, descriptor size, type, then both padded to four bytes.
func hasPVHNote(notes []byte) bool {
	pad := func(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
	for len(notes) >= 12 {
		nameSize := binary.LittleEndian.Uint32(notes)
		descSize := binary.LittleEndian.Uint32(notes[4:])
		kind := binary.LittleEndian.Uint32(notes[8:])
		next := 12 + pad(nameSize) + pad(descSize)
		if next > uint64(len(notes)) {
			return false
		}
		if kind == pvhNoteType && string(notes[12:12+nameSize]) == pvhNoteName {
			return true
		}
		notes = notes[next:]
	}
	return false
}
