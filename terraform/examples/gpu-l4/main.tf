# A job on L4 GPUs every night, over whatever prompts the folder holds by then, with mail when it fails:
#   terraform -chdir=terraform/examples/gpu-l4 apply -var project=PROJECT -var image_tag=TAG -var email=YOU@EXAMPLE.COM

terraform {
  required_version = ">= 1.9"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.50"
    }
    google-beta = {
      source  = "hashicorp/google-beta"
      version = "~> 6.50"
    }
  }
}

variable "project" {
  description = "Project to run in."
  type        = string
}

variable "image_tag" {
  description = "Tag that the cuda image was pushed under."
  type        = string
}

variable "email" {
  description = "Whom to tell when a job fails or stalls."
  type        = string
}

module "sdjax" {
  source = "../.."

  project   = var.project
  region    = "us-central1"
  image_tag = var.image_tag
  targets   = ["cuda"]
  alerts    = { emails = [var.email], max_hours = 12 }

  job = {
    name         = "nightly-l4"
    target       = "cuda"
    machine_type = "g2-standard-8"
    accelerator  = "type:nvidia-l4;count:1;install-nvidia-driver:latest"
    zone         = "us-central1-a"
    prompts      = "gs://${var.project}-sdjax-dataset/prompts/*.parquet"
    output       = "gs://${var.project}-sdjax-dataset/runs/nightly"
    max_workers  = 4
    schedule     = "0 2 * * *"
  }
}

output "sdjax" {
  description = "What pipelines.launch --terraform reads, all of it."
  value       = module.sdjax
}
