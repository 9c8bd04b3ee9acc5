variable "project" {
  description = "Id of the Google Cloud project that everything is made in. Best one of its own: see docs/security.md."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project))
    error_message = "project must be a project id: 6 to 30 lowercase letters, digits or hyphens, starting with a letter."
  }
}

variable "region" {
  description = "Region of the buckets, images, subnetwork and jobs. The worker zone of a job must lie in it."
  type        = string
  default     = "us-central1"

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.region))
    error_message = "region must be a region such as us-central1, not a zone."
  }
}

variable "name" {
  description = "Prefix of every resource's name."
  type        = string
  default     = "sdjax"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,10}[a-z0-9]$", var.name))
    error_message = "name must be 3 to 12 lowercase letters, digits or hyphens, starting with a letter."
  }
}

variable "image_tag" {
  description = "Tag that the images are pushed under, such as a commit. The templates point at NAME-TARGET:TAG."
  type        = string

  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$", var.image_tag)) && var.image_tag != "latest"
    error_message = "image_tag must be a fixed tag, such as a commit or a version, and not latest."
  }
}

variable "targets" {
  description = "Dockerfile targets to make a Flex Template for."
  type        = set(string)
  default     = ["tpu", "cuda"]

  validation {
    condition     = length(var.targets) > 0 && alltrue([for target in var.targets : contains(["tpu", "cuda", "cpu"], target)])
    error_message = "targets must be one or more of tpu, cuda and cpu."
  }
}

variable "subnetwork_cidr" {
  description = "Internal address range of the workers; a /20 holds 4,092 of them."
  type        = string
  default     = "10.64.0.0/20"

  validation {
    condition     = can(cidrnetmask(var.subnetwork_cidr)) && try(tonumber(split("/", var.subnetwork_cidr)[1]), 0) >= 8
    error_message = "subnetwork_cidr must be an IPv4 range such as 10.64.0.0/20, /8 or smaller."
  }
}

variable "launchers" {
  description = "Principals (user:..., group:..., serviceAccount:...) that may act as the launcher and so start jobs."
  type        = set(string)
  default     = []

  validation {
    condition     = alltrue([for member in var.launchers : can(regex("^(user|group|serviceAccount|principal|principalSet):", member))])
    error_message = "launchers must be named principals (user:, group:, serviceAccount:, principal: or principalSet:), never allUsers."
  }
}

variable "readers" {
  description = "Principals that may read prompts, images and manifests. Nobody else can, but for the workers and the launcher."
  type        = set(string)
  default     = []

  validation {
    condition     = alltrue([for member in var.readers : can(regex("^(user|group|serviceAccount|principal|principalSet):", member))])
    error_message = "readers must be named principals (user:, group:, serviceAccount:, principal: or principalSet:), never allUsers."
  }
}

variable "writers" {
  description = "Principals that may also put prompts and models into the dataset bucket. The launcher's account must be among them to launch with --direct."
  type        = set(string)
  default     = []

  validation {
    condition     = alltrue([for member in var.writers : can(regex("^(user|group|serviceAccount|principal|principalSet):", member))])
    error_message = "writers must be named principals (user:, group:, serviceAccount:, principal: or principalSet:), never allUsers."
  }
}

variable "cmek" {
  description = "Customer-managed key for buckets, images and jobs; project_number names the service agents that must use it, and must be there: see README.md. Null: Google's keys."
  type = object({
    key            = string
    project_number = number
  })
  default = null

  validation {
    condition     = var.cmek == null || can(regex("^projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+$", var.cmek.key))
    error_message = "cmek.key must be projects/P/locations/L/keyRings/R/cryptoKeys/K."
  }
}

variable "alerts" {
  description = "Whom to mail when a job fails, stops making progress for stall_minutes, or runs longer than max_hours. Null: no alerts."
  type = object({
    emails        = set(string)
    stall_minutes = optional(number, 60)
    max_hours     = optional(number, 48)
  })
  default = null

  validation {
    condition     = var.alerts == null || try(length(var.alerts.emails) > 0 && alltrue([for email in var.alerts.emails : can(regex("^[^@ ]+@[^@ ]+$", email))]), false)
    error_message = "alerts.emails must hold at least one mail address."
  }

  validation {
    condition     = var.alerts == null || try(var.alerts.stall_minutes >= 10 && var.alerts.stall_minutes <= 1410, false)
    error_message = "alerts.stall_minutes must be 10 to 1410: workers need minutes to start, and a condition looks back a day at most."
  }

  validation {
    condition     = var.alerts == null || try(var.alerts.max_hours > 0, false)
    error_message = "alerts.max_hours must be more than 0."
  }
}

variable "budget" {
  description = "Monthly budget of the project: mails at 50, 90 and 100 percent, and when 100 percent is forecast. It warns; it stops nothing. A person's login needs more for it: see README.md."
  type = object({
    billing_account = string
    amount          = number
    currency        = optional(string, "USD")
  })
  default = null

  validation {
    condition     = var.budget == null || try(can(regex("^[0-9A-F]{6}-[0-9A-F]{6}-[0-9A-F]{6}$", var.budget.billing_account)) && var.budget.amount >= 1 && floor(var.budget.amount) == var.budget.amount, false)
    error_message = "budget needs a billing_account such as 012345-6789AB-CDEF01 and a whole amount of at least 1."
  }
}

variable "job" {
  description = "A job to run: by the apply, and again by every apply that finds it ended (take it out once it is done), or by cron where schedule is set. Null (the default): jobs are started by pipelines.launch."
  type = object({
    name         = string
    target       = string
    machine_type = string
    accelerator  = string
    zone         = string
    prompts      = string
    output       = string
    max_workers  = optional(number, 1)
    disk_size_gb = optional(number, 100)
    parameters   = optional(map(string), {})
    schedule     = optional(string)
    time_zone    = optional(string, "Etc/UTC")
  })
  default = null

  validation {
    condition     = var.job == null || can(regex("^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$", var.job.name))
    error_message = "job.name must be 1 to 40 lowercase letters, digits or hyphens, starting with a letter and not ending in a hyphen."
  }

  validation {
    condition     = var.job == null || try(contains(var.targets, var.job.target), false)
    error_message = "job.target must be one of targets."
  }

  validation {
    condition     = var.job == null || try(startswith(var.job.zone, "${var.region}-"), false)
    error_message = "job.zone must be a zone of region: accelerators live in zones, and Dataflow does not choose one."
  }

  validation {
    condition = var.job == null || try(
      (var.job.target == "tpu" && can(regex("^type:tpu-[a-z0-9-]+;topology:[0-9]+x[0-9]+(x[0-9]+)?$", var.job.accelerator)) && startswith(var.job.machine_type, "ct")) ||
      (var.job.target == "cuda" && can(regex("^type:nvidia-[a-z0-9-]+;count:[0-9]+;install-nvidia-driver(:[a-z0-9]+)?$", var.job.accelerator))),
    false)
    error_message = "job.accelerator must be type:tpu-...;topology:AxB on a ct... machine for target tpu, or type:nvidia-...;count:N;install-nvidia-driver for target cuda."
  }

  validation {
    condition     = var.job == null || try(startswith(var.job.prompts, "gs://") && startswith(var.job.output, "gs://"), false)
    error_message = "job.prompts and job.output must be gs:// paths."
  }

  validation {
    condition     = var.job == null || try(var.job.max_workers >= 1 && var.job.disk_size_gb >= 50, false)
    error_message = "job.max_workers must be at least 1 and job.disk_size_gb at least 50: the image and the weights lie on that disk."
  }
}
