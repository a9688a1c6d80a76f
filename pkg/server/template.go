package server

import (
	"context"
	"path/filepath"
	"strings"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

type templateService struct {
	sandboxdv1.UnsafeTemplateServiceServer
	*Server
}

func (s *templateService) ListTemplates(ctx context.Context, _ *sandboxdv1.ListTemplatesRequest) (*sandboxdv1.ListTemplatesResponse, error) {
	templates, err := s.Workloads.Templates(ctx)
	if err != nil {
		return nil, err
	}
	answer := &sandboxdv1.ListTemplatesResponse{}
	for _, t := range templates {
		answer.Templates = append(answer.Templates, templateToAPI(t))
	}
	return answer, nil
}

func (s *templateService) BuildTemplate(ctx context.Context, r *sandboxdv1.BuildTemplateRequest) (*sandboxdv1.BuildTemplateResponse, error) {
	caller, _ := callerOf(ctx)
	t, err := s.Workloads.BuildTemplate(ctx, workload.TemplateOptions{
		Image: r.GetImage(), Resources: resourcesFromAPI(r.GetResources()), Labels: r.GetLabels(), Caller: caller,
		Network: r.GetNetwork(),
	})
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.BuildTemplateResponse{Template: templateToAPI(t)}, nil
}

func (s *templateService) RemoveTemplate(ctx context.Context, r *sandboxdv1.RemoveTemplateRequest) (*sandboxdv1.RemoveTemplateResponse, error) {
	if err := s.Workloads.RemoveTemplate(ctx, r.GetId()); err != nil {
		return nil, err
	}
	return &sandboxdv1.RemoveTemplateResponse{}, nil
}

func templateToAPI(t runtime.Template) *sandboxdv1.Template {
	// The file is named by the digest: sha256-….erofs.
	image := strings.TrimSuffix(filepath.Base(t.ImagePath), ".erofs")
	return &sandboxdv1.Template{
		Id: t.ID, Image: strings.Replace(image, "-", ":", 1), Scope: validUTF8(t.Scope), Cpus: t.CPUs, MemoryBytes: t.MemoryBytes,
		Accelerator: t.Accelerator, AgentTransport: t.AgentTransport, MadeAt: timeToAPI(t.MadeAt), UsedAt: timeToAPI(t.UsedAt),
		Clones: uint64(t.Clones), Waiting: uint64(t.Waiting), DiskBytes: t.DiskBytes,
	}
}
